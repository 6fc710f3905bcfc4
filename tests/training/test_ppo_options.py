"""PPO's exact KL, its penalised surrogate, its early end and its entropy bonus, by loops."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.batches import TextBatch
from rlhf_jax.errors import InputError
from rlhf_jax.training import online, ppo
from tests.training.ppo_by_loop import (
    EOS,
    KEY,
    RATE,
    SCORES,
    SETTINGS,
    experience_by_loop,
    logprobs_by_loop,
    texts_of,
    update_with,
)

# --- off -----------------------------------------------------------------------------------------


@pytest.mark.newest
def test_by_default_there_is_no_more_than_there_was(model, state, batch, rollout):
    after, metrics, _ = update_with(model, SETTINGS)(state, batch, rollout, SCORES, KEY)
    assert (after.score_stats, after.penalty_coef) == (None, None)
    added = {"kl_exact", "score_scale", "unscaled_scores", "penalty_kl", "penalty_coef", "updates"}
    assert not {name for name in metrics if name.split("/")[1] in added | {"entropy_loss"}}
    assert "loss/entropy_avg" not in metrics
    values = {"surrogate": "clip", "max_approxkl": None, "entropy_coef": 0.0, "scale_reward": None}
    values |= {"exact_kl": False, "truncate_token": None, "missing_eos_score": None}
    settings = ppo.Settings()
    assert {name: getattr(settings, name) for name in values} == values


# --- the KL over the vocabulary ------------------------------------------------------------------


@pytest.mark.newest
def test_the_exact_kl_is_that_of_the_loops(model, state, batch, rollout):
    real = np.array([True, True, False, True])  # the third example only fills up the batch
    batch = batch._replace(prompt_mask=batch.prompt_mask & real[:, None])
    rollout = rollout._replace(mask=rollout.mask & real[:, None])
    settings = dataclasses.replace(SETTINGS, exact_kl=True)
    after, metrics, scored = update_with(model, settings)(state, batch, rollout, SCORES, KEY)
    sums = []
    for prompt, response in texts_of(scored):
        if not response:
            continue
        arguments = (model.config, prompt, response, settings.temperature)
        _, policy = logprobs_by_loop(state.params["model"], *arguments)
        _, ref = logprobs_by_loop(state.frozen["ref"], *arguments)
        sums.append(0.0)
        for t in range(len(response)):
            for v in range(model.config.vocab_size):
                sums[-1] += np.exp(policy[t, v]) * (policy[t, v] - ref[t, v])
    assert len(sums) == 3
    assert float(metrics["objective/kl_exact"]) == pytest.approx(np.mean(sums), rel=1e-3)
    plain, others, _ = update_with(model, SETTINGS)(state, batch, rollout, SCORES, KEY)
    assert set(metrics) - set(others) == {"objective/kl_exact"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        after.params,
        plain.params,
    )


# --- the penalised surrogate ---------------------------------------------------------------------

PENALISED = dataclasses.replace(
    SETTINGS, surrogate="kl_penalty", penalty_coef=2.0, penalty_target=0.01
)


def penalised_by_loop(model, params, examples, temperature, coef):
    """(loss, KL of the old policy to the new one, mean ratio, approxkl), means over tokens."""
    losses, kls, ratios, squares = [], [], [], []
    for example in examples:
        logprobs, _ = logprobs_by_loop(
            params["model"], model.config, example.prompt, example.response, temperature
        )
        for t in range(len(example.response)):
            ratio = np.exp(logprobs[t] - example.logprobs[t])
            kls.append(ratio - 1 - np.log(ratio))
            losses.append(coef * kls[-1] - example.advantages[t] * ratio)
            ratios.append(ratio)
            squares.append((logprobs[t] - example.logprobs[t]) ** 2 / 2)
    return tuple(map(np.mean, (losses, kls, ratios, squares)))


@pytest.mark.newest
def test_the_penalised_surrogate_is_that_of_the_loops(model, state, batch, rollout):
    state = state._replace(penalty_coef=jnp.float32(2.0))
    once = update_with(model, PENALISED)(state, batch, rollout, SCORES, KEY)
    settings = dataclasses.replace(PENALISED, num_ppo_epochs=2)
    twice = update_with(model, settings)(state, batch, rollout, SCORES, KEY)
    examples = experience_by_loop(model, settings, state, twice[2])
    loss, kl, ratio, approxkl = penalised_by_loop(
        model, once[0].params, examples, settings.temperature, 2.0
    )
    second = {
        name: 2 * float(twice[1][name]) - float(once[1][name])
        for name in ("loss/policy_avg", "val/ratio", "policy/approxkl_avg")
    }
    assert second["loss/policy_avg"] == pytest.approx(loss, rel=2e-3, abs=2e-3)
    assert second["val/ratio"] == pytest.approx(ratio, rel=2e-3)
    assert second["policy/approxkl_avg"] == pytest.approx(approxkl, rel=2e-3)
    assert "policy/clipfrac_avg" not in twice[1]
    assert float(once[1]["policy/penalty_kl"]) == pytest.approx(kl, rel=2e-3)
    assert float(once[1]["policy/penalty_coef"]) == 2.0


@pytest.mark.newest
def test_the_coefficient_follows_the_kl_after_the_last_update(model, state, batch, rollout):
    state = state._replace(penalty_coef=jnp.float32(2.0))
    after, metrics, scored = update_with(model, PENALISED)(state, batch, rollout, SCORES, KEY)
    moved = float(metrics["policy/penalty_kl"])
    assert moved > 1.5 * PENALISED.penalty_target
    assert float(after.penalty_coef) == 4.0

    experience = online.Experience(scored, scored.logprobs, None)

    def adapted(target, coef):
        settings = dataclasses.replace(PENALISED, penalty_target=target)
        start = state._replace(penalty_coef=coef)
        return float(ppo._adapt_penalty(model, settings, start, after.params, experience)[0])

    assert [adapted(moved / share, 2.0) for share in (0.5, 1.0, 2.0)] == [1.0, 2.0, 4.0]
    # Halved for a hundred iterations more it would be 0, and never come back.
    least, most = 2.0 * 2.0**-20, 2.0 * 2.0**20
    assert adapted(1e6, least) == least
    assert adapted(1e-9, most) == most


def test_a_state_made_for_another_surrogate_is_refused(model, state, batch, rollout):
    with pytest.raises(ValueError, match="holds no penalty_coef"):
        update_with(model, PENALISED)(state, batch, rollout, SCORES, KEY)
    initial = ppo.init_state(model, state.params["model"], PENALISED, KEY)
    assert float(initial.penalty_coef) == 2.0


# --- the early end -------------------------------------------------------------------------------

MOMENTUM = optax.sgd(RATE, momentum=0.9)


@pytest.mark.newest
def test_updates_past_the_limit_change_nothing(model, state, batch, rollout):
    state = state._replace(opt_state=MOMENTUM.init(state.params))

    def run(epochs, limit=None):
        settings = dataclasses.replace(SETTINGS, num_ppo_epochs=epochs, max_approxkl=limit)
        step = ppo.make_update_step(model, settings, optimizer=MOMENTUM, stop_token_ids=(EOS,))
        return jax.jit(step)(state, batch, rollout, SCORES, KEY)

    free = {2: run(2), 3: run(3, limit=1e6)}
    assert float(free[3][1]["policy/updates"]) == 1.0
    sums = [n * float(free[n][1]["policy/approxkl_avg"]) for n in (2, 3)]
    second, third = sums[0], sums[1] - sums[0]  # the first minibatch has not moved
    assert 0 < second < third
    after, metrics, _ = run(4, limit=(second + third) / 2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (after.params, after.opt_state),
        (free[2][0].params, free[2][0].opt_state),
    )
    assert float(metrics["policy/updates"]) == 0.5
    # Means are those of the two updates taken and of the minibatch that ended it.
    for name in ("policy/approxkl_avg", "loss/policy_avg", "train/grad_norm", "val/ratio_var"):
        assert float(metrics[name]) == pytest.approx(float(free[3][1][name]), rel=1e-3), name


@pytest.mark.newest
def test_a_limit_that_ends_an_iteration_does_not_end_the_next(model, state, batch, rollout):
    settings = dataclasses.replace(SETTINGS, num_ppo_epochs=4, max_approxkl=1e-4)
    update = update_with(model, settings)
    for _ in range(2):
        before = state
        state, metrics, _ = update(state, batch, rollout, SCORES, KEY)
        assert float(metrics["policy/updates"]) == 0.25
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, before.params)
        assert min(jax.tree.leaves(moved)) > 0
    assert update._cache_size() == 1


# --- the entropy bonus ---------------------------------------------------------------------------


def entropy_by_loop(model, params, examples, temperature):
    """Mean entropy of the next token over the real tokens."""
    entropies = []
    for example in examples:
        _, full = logprobs_by_loop(
            params["model"], model.config, example.prompt, example.response, temperature
        )
        entropies += [-(np.exp(line) * line).sum() for line in full]
    return np.mean(entropies)


@pytest.mark.newest
def test_the_bonus_adds_the_gradient_of_the_entropy(model, state, batch, rollout):
    coef = 0.7
    settings = dataclasses.replace(SETTINGS, entropy_coef=coef)
    with_bonus, metrics, scored = update_with(model, settings)(state, batch, rollout, SCORES, KEY)
    without, _, _ = update_with(model, SETTINGS)(state, batch, rollout, SCORES, KEY)
    examples = experience_by_loop(model, settings, state, scored)
    entropy = entropy_by_loop(model, state.params, examples, settings.temperature)
    assert float(metrics["loss/entropy_avg"]) == pytest.approx(-entropy, rel=1e-3)
    gradient = jax.tree.map(
        lambda more, less: (np.asarray(more, np.float64) - np.asarray(less, np.float64)) / RATE,
        with_bonus.params,
        without.params,
    )
    square = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))
    sides = []
    for epsilon in (1e-3, -1e-3):
        moved = jax.tree.map(
            lambda p, g, e=epsilon: np.asarray(p, np.float64) + e * g, state.params, gradient
        )
        sides.append(coef * entropy_by_loop(model, moved, examples, settings.temperature))
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(square, rel=1e-2)


# --- together ------------------------------------------------------------------------------------


def test_with_everything_on_many_steps_compile_once(model, reward_model, state, batch):
    settings = dataclasses.replace(
        PENALISED,
        num_ppo_epochs=2,
        num_mini_batches=2,
        truncate_token=3,
        truncate_after=1,
        missing_eos_penalty=None,
        missing_eos_score=-1.0,
        scale_reward="running",
        exact_kl=True,
        max_approxkl=0.5,
        entropy_coef=0.01,
        ptx_coef=0.5,
    )
    real = jnp.ones((4, 6), jnp.int32)
    batch = batch._replace(texts=TextBatch(3 * real, real, real > 0))
    optimizer = optax.adam(1e-3)
    # Copies: the step takes the buffers of the state that it is given.
    params, reward = jax.tree.map(jnp.copy, (state.params["model"], state.frozen["reward"]))
    running = ppo.init_state(
        model, params, settings, KEY, optimizer=optimizer, reward_params=reward
    )
    full = ppo.make_step(
        model, settings, reward_model=reward_model, optimizer=optimizer, stop_token_ids=(EOS,)
    )
    step = jax.jit(full, donate_argnums=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of a donated buffer that it cannot use
        for number in range(3):
            running, metrics, _ = step(running, batch, jax.random.fold_in(KEY, number))
    assert step._cache_size() == 1
    assert int(running.score_stats.num_scores) == 12
    assert {(x.shape, x.dtype) for x in metrics.values()} == {((), jnp.dtype("float32"))}
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surrogate": "kl"}, "ppo.surrogate must be clip or kl_penalty, but is 'kl'"),
        ({"penalty_coef": 0.0}, "ppo.penalty_coef must be above 0, but is 0.0"),
        ({"penalty_target": -1.0}, "ppo.penalty_target must be above 0, but is -1.0"),
        ({"max_approxkl": 0.0}, "ppo.max_approxkl must be above 0, but is 0.0"),
        ({"cliprange_reward": 0.0}, "ppo.cliprange_reward must be above 0, but is 0.0"),
        ({"entropy_coef": -0.1}, "ppo.entropy_coef must not be negative, but is -0.1"),
    ],
    ids=str,
)
def test_settings_out_of_range_say_what_is_allowed(change, message):
    with pytest.raises(InputError, match=message):
        ppo.Settings(**change)
