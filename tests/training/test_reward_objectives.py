"""The other objectives of a reward model: every token of a pair, and rankings of K responses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.batches import RankingBatch
from rlhf_jax.errors import InputError
from rlhf_jax.training import reward
from tests.models.gpt2_by_loop import hidden_by_loop
from tests.training.test_reward import PAIRS, batch_of

TOKENWISE = reward.Settings(objective="tokenwise")
RANKING = reward.Settings(objective="ranking")
SGD, ADAM = optax.sgd(0.1), optax.adam(0.02)
KEY = jax.random.key(0)
NAMES = ("loss", "accuracy", "margin")

# (prompt, responses, best first)
RANKINGS = [
    ([1, 5], [[2, 9, 10], [3, 10], [4, 4, 10], [7, 10]]),
    ([4], [[10], [7, 7, 2, 10]]),
    ([2, 2, 2], [[6, 10], [5, 5, 10], [1, 10]]),
]
# A pair whose responses begin alike, so that not every token counts.
ALIKE = ([7, 3], [8, 1, 2, 10], [8, 1, 5], 0.0)


def rankings_of(rankings, examples, places=4, prompt_width=4, width=5):
    """A RankingBatch with junk wherever nothing is real."""
    prompts = np.full((examples, prompt_width), 6, np.int32)
    responses = np.full((examples, places, width), 6, np.int32)
    prompt_mask, mask = np.zeros(prompts.shape, bool), np.zeros(responses.shape, bool)
    for row, (prompt, texts) in enumerate(rankings):
        prompts[row, prompt_width - len(prompt) :] = prompt
        prompt_mask[row, prompt_width - len(prompt) :] = True
        for place, text in enumerate(texts):
            responses[row, place, : len(text)] = text
            mask[row, place, : len(text)] = True
    return RankingBatch(*map(jnp.asarray, (prompts, prompt_mask, responses, mask)))


def scores_by_loop(params, config, prompt, response):
    """The score at each token of a response, float64[T]."""
    states = hidden_by_loop(params["model"], config, prompt + response)[len(prompt) :]
    return states @ np.asarray(params["head"]["kernel"], np.float64)


def pair_losses_by_loop(params, config, rankings):
    """For each ranking a list of (loss, is right, difference), one for each of its pairs."""
    actual = []
    for prompt, texts in rankings:
        end_scores = [scores_by_loop(params, config, prompt, text)[-1] for text in texts]
        pairs = [(a, b) for i, a in enumerate(end_scores) for b in end_scores[i + 1 :]]
        actual.append([(np.log1p(np.exp(b - a)), a > b, a - b) for a, b in pairs])
    return actual


def tokenwise_by_loop(params, config, pairs):
    """(loss, accuracy, margin), means over pairs; a response that has ended keeps its score."""
    actual = []
    for prompt, chosen, rejected, _ in pairs:
        a, b = (list(scores_by_loop(params, config, prompt, x)) for x in (chosen, rejected))
        end = max(len(a), len(b))
        first = next(t for t in range(end) if chosen[t : t + 1] != rejected[t : t + 1])
        losses = []
        for t in range(first, end):
            difference = a[min(t, len(a) - 1)] - b[min(t, len(b) - 1)]
            losses.append(np.log1p(np.exp(-difference)))
        actual.append((np.mean(losses), a[-1] > b[-1], a[-1] - b[-1]))
    return np.mean(actual, axis=0)


@functools.cache  # the programs that tests share are compiled once
def jitted(model, settings, optimizer=SGD):
    return jax.jit(reward.make_step(model, settings, optimizer=optimizer))


@pytest.fixture(scope="module")
def steps(reward_model):
    return {settings: jitted(reward_model, settings) for settings in (TOKENWISE, RANKING)}


@pytest.fixture(scope="module")
def state(reward_model, reward_params):
    return reward.init_state(reward_model, reward_params, RANKING, KEY, optimizer=SGD)


def assert_means(metrics, expected):
    for name, value in zip(NAMES, expected, strict=True):
        assert float(metrics[f"train/{name}"]) == pytest.approx(value, rel=1e-3, abs=1e-4)


@pytest.mark.newest
def test_tokenwise_is_the_mean_from_the_first_difference_on(
    reward_model, reward_params, steps, state
):
    pairs = [*PAIRS, ALIKE]
    _, metrics = steps[TOKENWISE](state, batch_of(pairs, 6), KEY)
    assert_means(metrics, tokenwise_by_loop(reward_params, reward_model.config, pairs))
    assert float(metrics["perf/tokens"]) == sum(len(text) for p in pairs for text in p[:3])
    _, last_token = jitted(reward_model, reward.Settings())(state, batch_of([ALIKE], 6), KEY)
    _, tokenwise = steps[TOKENWISE](state, batch_of([ALIKE], 6), KEY)
    assert abs(float(last_token["train/loss"] - tokenwise["train/loss"])) > 1e-3
    margins = [float(each["train/margin"]) for each in (last_token, tokenwise)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-4)


@pytest.mark.newest
def test_every_ranking_counts_the_same(reward_model, reward_params, steps, state):
    _, metrics = steps[RANKING](state, rankings_of(RANKINGS, 4), KEY)
    actual = pair_losses_by_loop(reward_params, reward_model.config, RANKINGS)
    assert_means(metrics, np.mean([np.mean(pairs, axis=0) for pairs in actual], axis=0))
    tokens = sum(len(prompt) + sum(map(len, texts)) for prompt, texts in RANKINGS)
    assert float(metrics["perf/tokens"]) == tokens


@pytest.mark.newest
def test_the_evaluation_counts_every_pair_the_same(reward_model, reward_params):
    evaluate = jax.jit(reward.make_eval_step(reward_model))
    actual = pair_losses_by_loop(reward_params, reward_model.config, RANKINGS)
    expected = np.mean([pair for pairs in actual for pair in pairs], axis=0)
    sums = [evaluate(reward_params, rankings_of(RANKINGS[i : i + 2], 2)) for i in (0, 2)]
    assert sum(float(part["count"]) for part in sums) == 6 + 1 + 3
    for name, value in zip(NAMES, expected, strict=True):
        total = sum(float(part[name]) for part in sums)
        assert total / 10 == pytest.approx(value, rel=1e-3, abs=1e-4)
    # The same pairs, each as an example of its own.
    pairs = [(p, a, b, 0.0) for p, texts in RANKINGS for i, a in enumerate(texts)
             for b in texts[i + 1 :]]  # fmt: skip
    apart = evaluate(reward_params, batch_of(pairs, len(pairs)))
    for name in (*NAMES, "count"):
        total = sum(float(part[name]) for part in sums)
        assert total == pytest.approx(float(apart[name]), rel=1e-4, abs=1e-4)


@pytest.mark.newest
def test_the_responses_of_a_ranking_do_not_see_each_other(reward_model, reward_params):
    score = jax.jit(reward.make_score_step(reward_model))
    together = np.asarray(score(reward_params, rankings_of(RANKINGS, 3)))
    for row, (prompt, texts) in enumerate(RANKINGS):
        for place, text in enumerate(texts):
            alone = score(reward_params, rankings_of([(prompt, [text])], 1, places=1))
            assert float(alone[0, 0]) == pytest.approx(together[row, place], rel=1e-4, abs=1e-5)
            by_loop = scores_by_loop(reward_params, reward_model.config, prompt, text)[-1]
            assert by_loop == pytest.approx(together[row, place], rel=1e-3, abs=1e-3)


def test_pairs_are_scored_with_the_chosen_one_first(reward_model, reward_params):
    scores = jax.jit(reward.make_score_step(reward_model))(reward_params, batch_of(PAIRS, 4))
    for row, (prompt, *texts, _) in enumerate(PAIRS):
        for k, text in enumerate(texts):
            by_loop = scores_by_loop(reward_params, reward_model.config, prompt, text)[-1]
            assert by_loop == pytest.approx(float(scores[row, k]), rel=1e-3, abs=1e-3)


@pytest.mark.newest
def test_a_ranking_of_two_is_a_pair(reward_model, steps, state):
    pairs = [(*pair[:3], 0.0) for pair in PAIRS]
    expected = jitted(reward_model, reward.Settings())(state, batch_of(pairs, 4), KEY)
    rankings = rankings_of([(prompt, [a, b]) for prompt, a, b, _ in pairs], 4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        steps[RANKING](state, rankings, KEY),
        expected,
    )


@pytest.mark.newest
@pytest.mark.parametrize("settings", [TOKENWISE, RANKING], ids=lambda s: s.objective)
def test_padding_is_never_read_and_examples_of_it_change_nothing(steps, state, settings):
    if settings is RANKING:
        batch, filled = rankings_of(RANKINGS, 3), rankings_of(RANKINGS, 5, places=6)
        poisoned = batch._replace(
            prompts=jnp.where(batch.prompt_mask, batch.prompts, 2**30),
            responses=jnp.where(batch.mask, batch.responses, -1),
        )
    else:
        batch, filled = batch_of(PAIRS, 4), batch_of(PAIRS, 6)
        poisoned = batch._replace(
            prompts=jnp.where(batch.prompt_mask, batch.prompts, 2**30),
            chosen=jnp.where(batch.chosen_mask, batch.chosen, -1),
            rejected=jnp.where(batch.rejected_mask, batch.rejected, 2**30),
        )
    expected = steps[settings](state, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, steps[settings](state, poisoned, KEY), expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        steps[settings](state, filled, KEY),
        expected,
    )


@pytest.mark.parametrize("settings", [TOKENWISE, RANKING], ids=lambda s: s.objective)
def test_training_puts_the_responses_in_order(reward_model, reward_params, settings):
    state = reward.init_state(reward_model, reward_params, settings, KEY, optimizer=ADAM)
    step = jitted(reward_model, settings, ADAM)
    batch = rankings_of(RANKINGS, 3) if settings is RANKING else batch_of(PAIRS, 4)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch, KEY)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert float(metrics["train/accuracy"]) == 1.0
    assert step._cache_size() == 1


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(
        InputError, match="reward.objective must be last_token, tokenwise or ranking"
    ):
        reward.Settings(objective="listwise")
    for objective in ("tokenwise", "ranking"):
        with pytest.raises(InputError, match=f"center_coef is 0.1, .* set it to 0 for {objective}"):
            reward.Settings(objective=objective, center_coef=0.1)
