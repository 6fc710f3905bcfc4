"""PPO: one iteration by loops, what stays constant, and that it learns."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.batches import PromptBatch, Rollout, Sequences
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.rollout.shaping import shape_scores
from rlhf_jax.training import online, ppo
from tests.models.gpt2_by_loop import hidden_by_loop
from tests.training.ppo_by_loop import (
    EOS,
    KEY,
    RATE,
    SCORES,
    SETTINGS,
    SGD,
    experience_by_loop,
    losses_by_loop,
    texts_of,
    update_with,
)


@pytest.fixture(scope="module")
def step(model, reward_model):
    """The full iteration; it donates its state, so copies go in."""
    full = ppo.make_step(
        model, SETTINGS, reward_model=reward_model, optimizer=SGD, stop_token_ids=(EOS,)
    )
    jitted = jax.jit(full, donate_argnums=0)

    def run(state, batch, key=KEY):
        return jitted(jax.tree.map(jnp.copy, state), batch, key)

    run.jitted = jitted
    return run


@pytest.fixture(scope="module")
def done(step, state, batch):
    """(new state, metrics, scored rollout) of one iteration."""
    return step(state, batch)


def check_scored(examples, scored):
    """The arrays of a ScoredRollout against the loops, and zero off the mask."""
    mask = np.asarray(scored.mask)
    for name in ("logprobs", "ref_logprobs", "values"):
        array = np.asarray(getattr(scored, name))
        assert not array[~mask].any()
        for row, expected in enumerate(examples):
            np.testing.assert_allclose(
                array[row][mask[row]], getattr(expected, name), rtol=1e-3, atol=1e-3
            )


def check_objective(metrics, examples, kl_coef):
    """`objective/...` against the loops: means over the examples that are responses."""
    examples = [example for example in examples if example.response]
    penalties = [example.rewards.sum() - example.score for example in examples]
    expected = {
        "scores": np.mean([example.score for example in examples]),
        "scores_std": np.std([example.score for example in examples]),
        "kl": np.mean([example.kl.sum() for example in examples]),
        "non_score_reward": np.mean(penalties),
        "rlhf_reward": np.mean([example.rewards.sum() for example in examples]),
        "entropy": np.mean([-example.logprobs.sum() for example in examples]),
        "response_length": np.mean([len(example.response) for example in examples]),
        "kl_coef": kl_coef,
    }
    for name, value in expected.items():
        got = float(metrics[f"objective/{name}"])
        assert got == pytest.approx(value, rel=1e-3, abs=1e-3), name
    entropy = np.concatenate([example.entropy for example in examples]).mean()
    assert float(metrics["policy/entropy_avg"]) == pytest.approx(entropy, rel=1e-3)
    tokens = sum(len(example.prompt) + len(example.response) for example in examples)
    assert float(metrics["perf/tokens"]) == tokens


def test_scores_are_read_at_the_end_shaped_and_kept(done, reward_model, reward_params):
    scored = done[2]
    kernel = np.asarray(reward_params["head"]["kernel"], np.float64)
    lengths = set()
    for (prompt, response), score in zip(texts_of(scored), scored.scores, strict=True):
        raw = hidden_by_loop(reward_params["model"], reward_model.config, prompt + response)[-1]
        expected = raw @ kernel - (0.0 if EOS in response else 0.75)
        assert float(score) == pytest.approx(np.clip(expected, -1.5, 1.5), rel=1e-3, abs=1e-3)
        lengths.add(len(response))
    assert len(lengths) > 1


def test_one_iteration_is_that_of_the_loops(done, model, state):
    after, metrics, scored = done
    examples = experience_by_loop(model, SETTINGS, state, scored)
    check_scored(examples, scored)
    check_objective(metrics, examples, 0.3)
    policy, value, _, _ = losses_by_loop(model, SETTINGS, state.params, examples)
    assert float(metrics["loss/policy_avg"]) == pytest.approx(policy, abs=1e-3)
    assert float(metrics["loss/value_avg"]) == pytest.approx(value, rel=1e-3)
    assert int(after.step) == 1
    assert {(x.shape, x.dtype) for x in metrics.values()} == {((), jnp.dtype("float32"))}


def test_the_update_follows_the_gradient_of_the_loops(done, model, state):
    after, metrics, scored = done
    examples = experience_by_loop(model, SETTINGS, state, scored)
    gradient = jax.tree.map(
        lambda old, new: (np.asarray(old, np.float64) - np.asarray(new, np.float64)) / RATE,
        state.params,
        after.params,
    )
    square = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))
    assert float(metrics["train/grad_norm"]) == pytest.approx(square**0.5, rel=1e-3)
    sides = []
    for epsilon in (1e-5, -1e-5):
        moved = jax.tree.map(
            lambda p, g, e=epsilon: np.asarray(p, np.float64) + e * g, state.params, gradient
        )
        policy, value, _, _ = losses_by_loop(model, SETTINGS, moved, examples)
        sides.append(policy + SETTINGS.vf_coef * value)
    assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(square, rel=1e-2)


def test_against_itself_the_kl_is_zero_and_the_first_ratio_one(step, state, batch):
    frozen = {**state.frozen, "ref": state.params["model"]}
    _, metrics, scored = step(state._replace(frozen=frozen), batch)
    np.testing.assert_allclose(scored.logprobs, scored.ref_logprobs, atol=1e-5)
    assert float(metrics["objective/kl"]) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics["objective/non_score_reward"]) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics["val/ratio"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["policy/approxkl_avg"]) == pytest.approx(0.0, abs=1e-9)
    assert float(metrics["policy/clipfrac_avg"]) == 0.0
    assert float(metrics["val/clipfrac_avg"]) == 0.0


def test_logprobs_are_those_of_sampling(done, model, state, batch):
    sample_key, _ = jax.random.split(KEY)
    half = jax.jit(ppo.make_rollout_step(model, SETTINGS, stop_token_ids=(EOS,)))
    sampled, scored = half(state, batch, sample_key), done[2]
    np.testing.assert_array_equal(sampled.tokens, scored.tokens)
    np.testing.assert_array_equal(sampled.mask, scored.mask)
    np.testing.assert_allclose(sampled.logprobs, scored.logprobs, rtol=1e-3, atol=1e-3)


def test_two_partial_runs_equal_one_full_run(done, model, reward_model, state, batch):
    sample_key, update_key = jax.random.split(KEY)
    sampled = Rollout(done[2].tokens, done[2].mask, done[2].logprobs)
    sequences = Sequences(batch.prompts, batch.prompt_mask, sampled.tokens, sampled.mask)
    scores = jax.jit(end_scores, static_argnums=0)(reward_model, state.frozen["reward"], sequences)
    halves = update_with(model, SETTINGS)(state, batch, sampled, scores, update_key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), halves, done)


def test_the_same_key_gives_the_same_and_another_does_not(step, state, batch, done):
    jax.tree.map(np.testing.assert_array_equal, step(state, batch), done)
    other = step(state, batch, jax.random.key(8))
    assert (np.asarray(other[2].tokens) != np.asarray(done[2].tokens)).any()


def test_padding_of_prompts_is_never_read(step, state, batch, done):
    poisoned = batch._replace(prompts=jnp.where(batch.prompt_mask, batch.prompts, 2**30))
    after, metrics, _ = step(state, poisoned)
    jax.tree.map(np.testing.assert_array_equal, (after, metrics), done[:2])


def test_many_steps_compile_once_and_leave_the_reference_alone(step, state, batch):
    running = jax.tree.map(jnp.copy, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of a donated buffer that it cannot use
        for number in range(3):
            given, (running, metrics, _) = (
                running,
                step.jitted(running, batch, jax.random.fold_in(KEY, number)),
            )
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert step.jitted._cache_size() == 1
    assert int(running.step) == 3
    assert all(np.isfinite(value) for value in metrics.values())
    jax.tree.map(np.testing.assert_array_equal, running.frozen, state.frozen)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), running.params["model"], state.params["model"]
    )
    assert min(jax.tree.leaves(moved)) > 0


WHITENED = dataclasses.replace(
    SETTINGS,
    temperature=1.0,
    kl_estimator="k3",
    whiten_rewards=True,
    adaptive_kl=True,
    target=0.5,
    horizon=30.0,
    missing_eos_penalty=None,
    cliprange_reward=None,
)


@pytest.fixture(scope="module")
def whitened(model):
    return update_with(model, WHITENED)


def test_whitened_rewards_k3_and_the_controller_are_those_of_the_loops(
    whitened, model, state, batch, rollout
):
    after, metrics, scored = whitened(state, batch, rollout, SCORES, KEY)
    np.testing.assert_array_equal(scored.scores, SCORES)
    examples = experience_by_loop(model, WHITENED, state, scored)
    check_scored(examples, scored)
    check_objective(metrics, examples, 0.3)
    _, value, _, _ = losses_by_loop(model, WHITENED, state.params, examples)
    assert float(metrics["loss/value_avg"]) == pytest.approx(value, rel=1e-3)
    observed = np.mean([example.kl.sum() for example in examples])
    error = np.clip(observed / 0.5 - 1.0, -0.2, 0.2)
    assert float(after.kl_coef) == pytest.approx(0.3 * (1 + error * 4 / 30.0), rel=1e-3)


def test_responses_padding_is_never_read(whitened, state, batch, rollout):
    expected = whitened(state, batch, rollout, SCORES, KEY)
    junk = Rollout(
        jnp.where(rollout.mask, rollout.tokens, 3),
        rollout.mask,
        jnp.full_like(rollout.logprobs, jnp.nan),
    )
    after, metrics, _ = whitened(state, batch, junk, SCORES, KEY)
    jax.tree.map(np.testing.assert_array_equal, (after, metrics), expected[:2])


def test_an_example_that_fills_up_the_batch_counts_nowhere(whitened, model, state, batch, rollout):
    real = np.array([True, True, False, True])
    batch = batch._replace(prompt_mask=batch.prompt_mask & real[:, None])
    rollout = rollout._replace(mask=rollout.mask & real[:, None])
    scores = np.where(real, SCORES, np.nan)
    after, metrics, scored = whitened(state, batch, rollout, scores, KEY)
    examples = experience_by_loop(model, WHITENED, state, scored)
    check_objective(metrics, examples, 0.3)
    policy, value, _, _ = losses_by_loop(model, WHITENED, state.params, examples)
    assert float(metrics["loss/policy_avg"]) == pytest.approx(policy, abs=1e-3)
    assert float(metrics["loss/value_avg"]) == pytest.approx(value, rel=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, metrics)))
    observed = np.mean([example.kl.sum() for example in examples if example.response])
    error = np.clip(observed / 0.5 - 1.0, -0.2, 0.2)
    assert float(after.kl_coef) == pytest.approx(0.3 * (1 + error * 3 / 30.0), rel=1e-4)


def test_the_second_epoch_clips_like_the_loops(model, state, batch, rollout):
    settings = dataclasses.replace(SETTINGS, cliprange=0.05, cliprange_value=0.01)
    once = update_with(model, settings)(state, batch, rollout, SCORES, KEY)
    settings = dataclasses.replace(settings, num_ppo_epochs=2)
    twice = update_with(model, settings)(state, batch, rollout, SCORES, KEY)
    examples = experience_by_loop(model, settings, state, twice[2])
    second = losses_by_loop(model, settings, once[0].params, examples)
    names = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/ratio")
    for name, expected in zip(names, second, strict=True):
        got = 2 * float(twice[1][name]) - float(once[1][name])
        assert got == pytest.approx(expected, rel=2e-3, abs=2e-3), name
    assert second[2] > 0.1  # something was clipped
    ratios = (1.0, second[3])
    assert float(twice[1]["val/ratio_var"]) == pytest.approx(np.var(ratios), rel=2e-2)


@dataclasses.dataclass(frozen=True)
class RecordingModel(GPT2):
    """Appends the tokens of each batch that it embeds to `seen`."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def embed(self, params, tokens, positions, **options):
        jax.debug.callback(lambda x: self.seen.append(np.asarray(x)), tokens, ordered=True)
        return super().embed(params, tokens, positions, **options)


@pytest.mark.newest
def test_each_epoch_visits_each_example_once_in_its_own_order(model):
    recording = RecordingModel(model.config)
    settings = dataclasses.replace(
        SETTINGS, batch_size=8, num_mini_batches=2, num_ppo_epochs=3, response_length=1
    )
    frozen = model.init(jax.random.key(0))
    state = ppo.init_state(model, frozen, settings, KEY, optimizer=SGD)
    ones = jnp.ones((8, 1), bool)
    batch = PromptBatch(jnp.arange(8)[:, None], ones, jnp.arange(8))
    rollout = Rollout(jnp.zeros((8, 1), jnp.int32), ones, jnp.zeros((8, 1)))
    update = update_with(recording, settings)

    def orders(key):
        recording.seen.clear()
        jax.block_until_ready(update(state, batch, rollout, jnp.zeros(8), key))
        jax.effects_barrier()
        minibatches = [x[:, 0].tolist() for x in recording.seen if len(x) == 4]
        assert len(minibatches) == 6
        return [minibatches[i] + minibatches[i + 1] for i in range(0, 6, 2)]

    first = orders(KEY)
    for order in first:
        assert sorted(order) == list(range(8))
    assert len({tuple(order) for order in [list(range(8)), *first]}) == 4
    assert orders(KEY) == first
    assert orders(jax.random.key(0)) != first


def test_limits_are_drawn_for_each_response(model, params):
    settings = dataclasses.replace(SETTINGS, min_response_length=2, stop_at_eos=False)
    batch = PromptBatch(jnp.ones((64, 1), jnp.int32), jnp.ones((64, 1), bool), jnp.arange(64))
    sample = jax.jit(
        functools.partial(online.sample_responses, model, settings=settings, stop_token_ids=(EOS,))
    )
    rollout = sample(params, batch, KEY)
    lengths = np.asarray(rollout.mask).sum(axis=1)
    assert set(lengths) == {2, 3, 4, 5}
    other = np.asarray(sample(params, batch, jax.random.key(9)).mask).sum(axis=1)
    assert (lengths != other).any()
    # EOS was drawn, and did not end the response.
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    assert ((tokens[:, :-1] == EOS) & mask[:, 1:]).any()


@pytest.mark.parametrize("dtype", [np.int32, np.float16, np.float32])
def test_scores_of_any_type_keep_their_fractions(dtype, rollout):
    shaped = shape_scores(SETTINGS, (EOS,), rollout, jnp.array([1, -7, 7, 1], dtype))
    assert shaped.dtype == jnp.float32
    np.testing.assert_allclose(shaped, [1.0, -1.5, 1.5, 0.25])


def test_eos_on_the_padding_is_no_eos(rollout):
    junk = rollout._replace(tokens=jnp.where(rollout.mask, jnp.minimum(rollout.tokens, 9), EOS))
    shaped = shape_scores(SETTINGS, (EOS,), junk, jnp.zeros(4))
    np.testing.assert_allclose(shaped, -0.75)


@pytest.mark.newest
def test_ppo_learns_what_is_rewarded():
    model = GPT2(GPT2Config(vocab_size=11, n_positions=12, n_embd=16, n_layer=1, n_head=2))
    settings = ppo.Settings(
        batch_size=32, num_ppo_epochs=2, num_mini_batches=2, response_length=8, kl_coef=0.01
    )
    optimizer = optax.adam(0.01)
    state = ppo.init_state(model, model.init(KEY), settings, KEY, optimizer=optimizer)
    batch = PromptBatch(jnp.ones((32, 1), jnp.int32), jnp.ones((32, 1), bool), jnp.arange(32))
    sample = jax.jit(ppo.make_rollout_step(model, settings, stop_token_ids=(EOS,)))
    update = jax.jit(ppo.make_update_step(model, settings, optimizer=optimizer))

    def share(rollout):
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
        return ((tokens == 3) & mask).sum(axis=1) / mask.sum(axis=1)

    shares = []
    for number in range(30):
        keys = jax.random.split(jax.random.fold_in(KEY, number))
        rollout = sample(state, batch, keys[0])
        scores = share(rollout).astype(np.float32)
        shares.append(scores.mean())
        state, metrics, _ = update(state, batch, rollout, scores, keys[1])
    assert np.mean(shares[:3]) < 0.2
    assert np.mean(shares[-3:]) > 0.7
    assert float(metrics["objective/kl"]) > 0.5
    assert (sample._cache_size(), update._cache_size()) == (1, 1)
