"""Score shaping: cut responses, missing EOS, clipping, scaling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.errors import InputError
from rlhf_jax.rollout.shaping import (
    empty_score_stats,
    scale_scores,
    shape_scores,
    truncate_responses,
)
from rlhf_jax.training import online, ppo
from tests.training.ppo_by_loop import EOS, KEY, SCORES, SETTINGS, SGD, update_with

STOP = 3
PLAIN = dataclasses.replace(SETTINGS, missing_eos_penalty=None, cliprange_reward=None)


def random_rollout(seed, examples=64, length=7):
    """Responses over few tokens, with EOS and STOP in any place, and both on the padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice([0, 1, STOP, EOS], p=[0.5, 0.2, 0.2, 0.1], size=(examples, length))
    mask = np.zeros(tokens.shape, bool)
    for row in range(examples):
        stops = np.flatnonzero(tokens[row] == EOS)
        mask[row, : stops[0] + 1 if len(stops) else rng.integers(1, length + 1)] = True
    mask[0] = False  # an example that only fills up the batch
    return Rollout(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.asarray(-0.5 * mask))


def end_by_loop(rollout, row, after):
    """Number of tokens of a response that is cut at the first STOP from `after` on."""
    real = int(rollout.mask[row].sum())
    for place in range(real):
        if place >= after and rollout.tokens[row, place] == STOP:
            return place + 1
    return real


@pytest.mark.newest
@pytest.mark.parametrize("after", [0, 2, 5])
def test_responses_are_over_with_the_first_such_token_from_a_place_on(after):
    settings = dataclasses.replace(
        PLAIN, truncate_token=STOP, truncate_after=after, response_length=7
    )
    rollout = random_rollout(after)
    cut = jax.jit(truncate_responses, static_argnums=0)(settings, rollout)
    lengths = [end_by_loop(rollout, row, after) for row in range(64)]
    assert (np.array(lengths) < np.asarray(rollout.mask).sum(axis=1)).any()
    for row, length in enumerate(lengths):
        for ours, given in ((cut.tokens, rollout.tokens), (cut.logprobs, rollout.logprobs)):
            np.testing.assert_array_equal(ours[row, :length], given[row, :length])
            assert not np.asarray(ours[row, length:]).any()
        assert np.asarray(cut.mask[row]).tolist() == [t < length for t in range(7)]


def test_nothing_is_cut_by_default():
    rollout = random_rollout(0)
    assert truncate_responses(PLAIN, rollout) is rollout


@pytest.mark.newest
def test_samples_are_those_without_the_cut_up_to_it(model, params):
    settings = dataclasses.replace(PLAIN, truncate_token=STOP, truncate_after=1)
    batch = PromptBatch(jnp.ones((32, 1), jnp.int32), jnp.ones((32, 1), bool), jnp.arange(32))
    complete, cut = (
        jax.jit(
            functools.partial(online.sample_responses, model, settings=which, stop_token_ids=(EOS,))
        )(params, batch, KEY)
        for which in (PLAIN, settings)
    )
    lengths = [end_by_loop(complete, row, 1) for row in range(32)]
    assert np.asarray(cut.mask).sum(axis=1).tolist() == lengths
    assert lengths != np.asarray(complete.mask).sum(axis=1).tolist()
    np.testing.assert_array_equal(cut.tokens, jnp.where(cut.mask, complete.tokens, 0))


@pytest.mark.parametrize("at_eos", [True, False])
@pytest.mark.parametrize("token", [None, STOP])
def test_a_response_without_an_end_gets_a_fixed_score(at_eos, token):
    if not at_eos and token is None:
        pytest.skip("no response has an end")
    settings = dataclasses.replace(
        PLAIN,
        response_length=7,
        stop_at_eos=at_eos,
        truncate_token=token,
        truncate_after=0 if token is None else 2,
        missing_eos_score=-1.25,
    )
    given = random_rollout(7)
    # With what was cut off still there, which is no end any more.
    rollout = truncate_responses(settings, given)._replace(tokens=given.tokens)
    scores = np.random.default_rng(8).normal(size=64).astype(np.float32)
    expected = scores.copy()
    for row in range(64):
        tokens = [t for t, real in zip(rollout.tokens[row], rollout.mask[row], strict=True) if real]
        by_eos = at_eos and EOS in tokens
        by_token = token is not None and len(tokens) > 2 and STOP in tokens[2:]
        if not (by_eos or by_token):
            expected[row] = -1.25
    assert 5 < (expected == -1.25).sum() < 60
    shaped = shape_scores(settings, (EOS,), rollout, jnp.asarray(scores))
    np.testing.assert_array_equal(shaped, expected)
    penalised = dataclasses.replace(settings, missing_eos_score=None, missing_eos_penalty=0.5)
    np.testing.assert_array_equal(
        shape_scores(penalised, (EOS,), rollout, jnp.asarray(scores)),
        np.where(expected == -1.25, scores - np.float32(0.5), scores),
    )


def scored_in_turn(settings, batches):
    """The scaled scores of each batch, and the statistics after the last one."""
    stats, scaled = empty_score_stats(), []
    scale = jax.jit(functools.partial(scale_scores, settings))
    for scores, examples in batches:
        result, stats, metrics = scale(stats, scores, examples)
        scaled.append((np.asarray(result), float(metrics["objective/score_scale"])))
    assert scale._cache_size() == 1
    return scaled, stats


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("kind", ["running", "ref"])
def test_scores_are_divided_by_the_deviation_until_now_or_of_the_first_iteration(kind, offset):
    settings = dataclasses.replace(PLAIN, scale_reward=kind)
    rng = np.random.default_rng(3)
    batches = []
    for number in range(5):
        scores = (rng.normal(size=6) * (1 + number) + offset).astype(np.float32)
        examples = rng.random(6) < (0.7 if number != 1 else 0.0)
        batches.append((np.where(examples, scores, np.nan).astype(np.float32), examples))
    scaled, stats = scored_in_turn(settings, batches)
    seen = []
    for number, ((scores, examples), (result, scale)) in enumerate(
        zip(batches, scaled, strict=True)
    ):
        if kind == "running" or number == 0:
            seen += [float(score) for score, real in zip(scores, examples, strict=True) if real]
        deviation = np.std(seen, ddof=1)
        assert scale == pytest.approx(deviation, rel=1e-4)
        np.testing.assert_allclose(result[examples], scores[examples] / deviation, rtol=1e-4)
    assert int(stats.num_scores) == len(seen)
    assert float(stats.mean) == pytest.approx(np.mean(seen), rel=1e-5, abs=1e-6)


def test_the_reference_is_the_first_iteration_that_has_scores():
    settings = dataclasses.replace(PLAIN, scale_reward="ref")
    first, second = np.float32([1.0, 2.0, 4.0]), np.float32([10.0, 30.0, 20.0])
    nobody, everybody = np.zeros(3, bool), np.ones(3, bool)
    scaled, _ = scored_in_turn(settings, [(second, nobody), (first, everybody)])
    assert scaled[0][1] == 1.0
    assert scaled[1][1] == pytest.approx(np.std([1.0, 2.0, 4.0], ddof=1), rel=1e-6)


@pytest.mark.parametrize("kind", ["running", "ref"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_scores_that_do_not_differ_stay_what_they_are(kind, value):
    settings = dataclasses.replace(PLAIN, scale_reward=kind)
    scores = np.full(7, value, np.float32)
    batches = [(scores, np.arange(7) < 1), (scores, np.ones(7, bool)), (scores, np.ones(7, bool))]
    for result, scale in scored_in_turn(settings, batches)[0]:
        assert scale == 1.0
        np.testing.assert_array_equal(result, scores)


@pytest.mark.newest
def test_scores_are_fixed_then_clipped_then_scaled(model, state, batch, rollout):
    settings = dataclasses.replace(
        PLAIN, missing_eos_score=-9.0, cliprange_reward=2.0, scale_reward="running"
    )
    update = update_with(model, settings)
    running = state._replace(score_stats=empty_score_stats())
    seen = []
    for number, factor in enumerate((1.0, 0.25)):
        running, metrics, scored = update(running, batch, rollout, SCORES * factor, KEY)
        clipped = np.clip([*SCORES[:3] * factor, -9.0], -2.0, 2.0)  # the last has no EOS
        seen += clipped.tolist()
        deviation = np.std(seen, ddof=1)
        np.testing.assert_allclose(scored.scores, clipped / deviation, rtol=1e-5)
        expected = {
            "objective/scores": np.mean(clipped / deviation),
            "objective/unscaled_scores": np.mean(clipped),
            "objective/score_scale": deviation,
        }
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert float(running.score_stats.num_scores) == 4 * (number + 1)
    assert update._cache_size() == 1


@pytest.mark.newest
def test_an_example_that_only_fills_up_the_batch_is_no_part_of_the_statistics(
    model, state, batch, rollout
):
    settings = dataclasses.replace(PLAIN, scale_reward="running")
    running = state._replace(score_stats=empty_score_stats())
    short = rollout._replace(mask=rollout.mask & (np.arange(4) != 1)[:, None])
    after, metrics, _ = update_with(model, settings)(running, batch, short, SCORES, KEY)
    assert float(after.score_stats.num_scores) == 3
    deviation = np.std(np.delete(SCORES, 1), ddof=1)
    assert float(metrics["objective/score_scale"]) == pytest.approx(deviation, rel=1e-5)


@pytest.mark.newest
def test_the_last_real_token_gets_the_scaled_score(model, state, batch, rollout):
    """The KL penalty is left out, so that rewards are scores, and returns those under lam = 1."""
    settings = dataclasses.replace(PLAIN, scale_reward="ref", gamma=1.0, lam=1.0)
    silent = state._replace(kl_coef=jnp.float32(0.0), score_stats=empty_score_stats())
    _, metrics, _ = update_with(model, settings)(silent, batch, rollout, SCORES, KEY)
    mean = np.mean(SCORES / np.std(SCORES, ddof=1))
    assert float(metrics["objective/rlhf_reward"]) == pytest.approx(mean, rel=1e-5)
    assert float(metrics["objective/non_score_reward"]) == pytest.approx(0.0, abs=1e-6)


def test_a_state_made_without_statistics_is_refused(model, state, batch, rollout):
    settings = dataclasses.replace(PLAIN, scale_reward="running")
    with pytest.raises(ValueError, match="holds no score_stats: create it with the same settings"):
        update_with(model, settings)(state, batch, rollout, SCORES, KEY)
    initial = ppo.init_state(model, state.params["model"], settings, KEY, optimizer=SGD)
    assert [float(x) for x in initial.score_stats] == [0.0, 0.0, 0.0]


def test_a_token_by_its_text_is_for_who_has_a_tokenizer(model, state, batch):
    settings = dataclasses.replace(PLAIN, truncate_token=".")
    with pytest.raises(InputError, match=r"is the text '\.', but a step knows no tokenizer"):
        jax.eval_shape(ppo.make_rollout_step(model, settings), state, batch, KEY)


def test_a_price_of_no_end_needs_something_that_ends(model):
    settings = dataclasses.replace(PLAIN, missing_eos_score=-1.0)
    endless = dataclasses.replace(settings, stop_at_eos=False)
    for which, stops in ((settings, ()), (endless, (EOS,))):
        with pytest.raises(InputError, match="need responses that can end: set ppo.stop_at_eos"):
            ppo.make_update_step(model, which, optimizer=SGD, stop_token_ids=stops)
    cut = dataclasses.replace(endless, truncate_token=STOP)
    ppo.make_update_step(model, cut, optimizer=SGD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truncate_token": ""}, "ppo.truncate_token must be a text or an id, but is ''"),
        ({"truncate_token": -1}, "ppo.truncate_token must be a text or an id, but is -1"),
        ({"truncate_token": 1, "truncate_after": 32}, "below ppo.response_length = 32, .* is 32"),
        ({"truncate_token": 1, "truncate_after": -1}, "below ppo.response_length = 32, .* is -1"),
        ({"truncate_after": 3}, "0 without ppo.truncate_token, but is 3"),
        ({"missing_eos_score": 0.0, "missing_eos_penalty": 1.0}, "exclude each other; set one"),
        ({"scale_reward": "std"}, "must be running, ref or null, but is 'std'"),
    ],
    ids=str,
)
def test_settings_out_of_range_say_what_is_allowed(change, message):
    with pytest.raises(InputError, match=message):
        ppo.Settings(**change)
