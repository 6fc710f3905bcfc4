"""Policy and value losses against loops, and at extremes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rlhf
from rlhf_jax import functional


def policy_by_loop(logprobs, old_logprobs, advantages, mask, clip_range):
    losses, clipped, squares, ratios = [], [], [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        log_ratio = float(logprobs[b, t]) - float(old_logprobs[b, t])
        ratio, advantage = np.exp(log_ratio), float(advantages[b, t])
        bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
        losses.append(-min(advantage * ratio, advantage * bounded))
        clipped.append(advantage * bounded < advantage * ratio)
        squares.append(log_ratio**2)
        ratios.append(ratio)
    return np.mean(losses), np.mean(clipped), np.mean(squares) / 2, np.mean(ratios)


def value_by_loop(values, old_values, returns, mask, clip_range):
    losses, clipped = [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        value, old, target = float(values[b, t]), float(old_values[b, t]), float(returns[b, t])
        bounded = old + min(max(value - old, -clip_range), clip_range)
        losses.append(max((value - target) ** 2, (bounded - target) ** 2) / 2)
        clipped.append(abs(value - old) > clip_range and losses[-1] > (value - target) ** 2 / 2)
    return np.mean(losses), np.mean(clipped)


def penalized_by_loop(logprobs, old_logprobs, advantages, mask, kl_coef):
    losses, kls, ratios = [], [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        log_ratio = float(logprobs[b, t]) - float(old_logprobs[b, t])
        ratios.append(np.exp(log_ratio))
        kls.append(ratios[-1] - 1 - log_ratio)
        losses.append(kl_coef * kls[-1] - ratios[-1] * float(advantages[b, t]))
    return np.mean(losses), np.mean(kls), np.mean(ratios)


def test_a_dual_clip_limits_the_loss_of_negative_advantages_alone():
    """At ratios of 2 and 5, and one below both ranges (Ye et al. 2020, figure 2)."""
    logprobs, mask = np.log(np.float32([[2.0, 5.0, 0.5, 5.0]])), np.ones((1, 4), bool)
    advantages, old = np.float32([[-1, -1, -1, 1]]), np.zeros((1, 4), np.float32)

    def losses(**options):
        loss = lambda x: rlhf.ppo_policy_loss(x, old, advantages, mask, **options)[0] * 4  # noqa: E731
        return jax.value_and_grad(loss)(logprobs)

    value, gradient = losses(dual_clip=3.0)
    np.testing.assert_allclose(value, 2 + 3 + 0.8 - 1.2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[2, 0, 0, 0]], rtol=1e-6)
    value, gradient = losses(dual_clip=3.0, clip_range=0.6, clip_range_high=4.5)
    np.testing.assert_allclose(value, 2 + 3 + 0.5 - 5, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[2, 0, 0.5, -5]], rtol=1e-6)
    with pytest.raises(ValueError, match="^dual_clip must be above 1, but is 1.0."):
        functional.ppo_policy_loss(logprobs, old, advantages, mask, dual_clip=1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ppo_policy_loss", {}), ("kl_penalty_policy_loss", {"kl_coef": 0.5}), ("grpo_loss", {})],
)
def test_without_old_logprobs_the_loss_is_on_policy(rng, ragged_mask, name, options):
    """Its gradient is that of constant old ones; with `logprobs` for both it would be 0."""
    logprobs = rng.normal(size=ragged_mask.shape).astype(np.float32)
    advantages = logprobs[:, 0] if name == "grpo_loss" else logprobs[::-1]

    def outputs(x, old):
        return getattr(rlhf, name)(x, old, advantages, ragged_mask, **options)

    on_policy = jax.value_and_grad(lambda x: outputs(x, None), has_aux=True)(logprobs)
    expected = jax.value_and_grad(lambda x: outputs(x, logprobs), has_aux=True)(logprobs)
    chex.assert_trees_all_close(on_policy, expected)
    assert np.any(on_policy[1])
    assert not np.any(jax.grad(lambda x: outputs(x, x)[0])(logprobs))


@pytest.mark.parametrize("clip_range", [None, 0.05, 0.5])
def test_policy_loss_matches_a_loop(rng, ragged_mask, clip_range):
    logprobs, old, advantages = rng.normal(size=(3, *ragged_mask.shape)).astype(np.float32)
    logprobs = (0.5 * old + 0.5 * logprobs).astype(np.float32)
    options = {} if clip_range is None else {"clip_range": clip_range}
    loss, metrics = rlhf.ppo_policy_loss(logprobs, old, advantages, ragged_mask, **options)
    expected = policy_by_loop(logprobs, old, advantages, ragged_mask, clip_range or 0.2)
    assert 0 < expected[1] < 1
    outputs = [loss, metrics["clipfrac"], metrics["approxkl"], metrics["ratio"]]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)


@pytest.mark.parametrize("clip_range", [None, 0.05, 0.5])
def test_value_loss_matches_a_loop(rng, ragged_mask, clip_range):
    values, old, returns = rng.normal(size=(3, *ragged_mask.shape)).astype(np.float32)
    options = {} if clip_range is None else {"clip_range": clip_range}
    loss, metrics = rlhf.ppo_value_loss(values, old, returns, ragged_mask, **options)
    expected = value_by_loop(values, old, returns, ragged_mask, clip_range or 0.2)
    assert 0 < expected[1] < 1
    np.testing.assert_allclose([loss, metrics["clipfrac"]], expected, rtol=1e-5)


def test_values_inside_the_range_are_not_clipped_by_rounding(rng):
    old = rng.uniform(-0.01, 0.01, size=(20, 20)).astype(np.float32)
    values = rng.uniform(-0.09, 0.09, size=old.shape).astype(np.float32)
    assert np.any(old + (values - old) != values)
    returns = rng.normal(size=old.shape).astype(np.float32)
    _, metrics = rlhf.ppo_value_loss(values, old, returns, np.ones(old.shape, bool))
    assert metrics["clipfrac"] == 0


@pytest.mark.parametrize("kl_coef", [0.0, 0.2, 3.0])
def test_kl_penalty_policy_loss_matches_a_loop(rng, ragged_mask, kl_coef):
    logprobs, old, advantages = rng.normal(size=(3, *ragged_mask.shape)).astype(np.float32)
    loss, metrics = rlhf.kl_penalty_policy_loss(
        logprobs, old, advantages, ragged_mask, kl_coef=kl_coef
    )
    expected = penalized_by_loop(logprobs, old, advantages, ragged_mask, kl_coef)
    np.testing.assert_allclose([loss, metrics["kl"], metrics["ratio"]], expected, rtol=1e-5)


@pytest.mark.parametrize("log_ratio", [1e-2, 1e-3, -1e-3, 1e-5])
def test_the_kl_of_almost_equal_policies_is_not_lost_to_rounding(log_ratio):
    new, zeros = np.full((1, 1), log_ratio, np.float32), np.zeros((1, 1), np.float32)
    _, metrics = rlhf.kl_penalty_policy_loss(new, zeros, zeros, np.ones((1, 1), bool), kl_coef=1.0)
    np.testing.assert_allclose(metrics["kl"], np.float64(log_ratio) ** 2 / 2, rtol=1e-2)


@pytest.mark.parametrize(("log_ratio", "grows"), [(39.0, True), (41.0, False)])
def test_the_ratio_is_limited_to_e_to_the_40(log_ratio, grows):
    old, mask = np.zeros((1, 1), np.float32), np.ones((1, 1), bool)
    advantages, logprobs = -np.ones((1, 1), np.float32), np.full((1, 1), log_ratio, np.float32)
    loss, gradient = jax.value_and_grad(
        lambda x: rlhf.ppo_policy_loss(x, old, advantages, mask)[0]
    )(logprobs)
    np.testing.assert_allclose(loss, np.exp(min(log_ratio, 40.0)), rtol=1e-5)
    assert bool(gradient[0, 0] > 0) == grows
    kl = jax.grad(lambda d: rlhf.kl_estimate(d, jnp.float32(0), "k3"))(jnp.float32(-log_ratio))
    assert bool(kl < 0) == grows


@pytest.mark.parametrize("log_ratio", [-1e4, -89.0, 89.0, 1e4])
@pytest.mark.parametrize("advantage", [-10.0, 0.0, 10.0])
def test_extreme_ratios_have_finite_penalties_and_gradients(log_ratio, advantage):
    old, advantages = np.zeros((1, 2), np.float32), np.float32([[advantage, 1.0]])
    logprobs, mask = np.float32([[log_ratio, 0.0]]), np.ones((1, 2), bool)
    (loss, metrics), gradient = jax.value_and_grad(rlhf.kl_penalty_policy_loss, has_aux=True)(
        logprobs, old, advantages, mask, kl_coef=0.5
    )
    assert np.isfinite([loss, *metrics.values()]).all()
    assert np.isfinite(gradient).all()
    if log_ratio < 0:  # the penalty's slope is kl_coef * (r - 1), and the other's -A * r
        np.testing.assert_allclose(metrics["kl"], (-log_ratio - 1) / 2, rtol=1e-6)
        np.testing.assert_allclose(gradient, [[-0.25, -0.5]], rtol=1e-6)


def test_reinforce_loss_matches_a_loop(rng, ragged_mask):
    logprobs, advantages = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)
    loss, metrics = rlhf.reinforce_loss(logprobs, advantages, ragged_mask)
    products = (np.float64(logprobs) * advantages)[ragged_mask]
    np.testing.assert_allclose(loss, -products.mean(), rtol=1e-5)
    assert metrics == {}


@pytest.mark.parametrize("log_ratio", [-1e4, -89.0, 89.0, 1e4])
@pytest.mark.parametrize("advantage", [-10.0, 0.0, 10.0])
def test_extreme_ratios_have_finite_losses_and_gradients(log_ratio, advantage):
    old, advantages = np.zeros((1, 2), np.float32), np.float32([[advantage, 1.0]])
    logprobs, mask = np.float32([[log_ratio, 0.0]]), np.ones((1, 2), bool)
    (loss, metrics), gradient = jax.value_and_grad(rlhf.ppo_policy_loss, has_aux=True)(
        logprobs, old, advantages, mask
    )
    assert np.isfinite([loss, *metrics.values()]).all()
    assert np.isfinite(gradient).all()
    if log_ratio > 0 and advantage > 0:  # clipped: the extreme ratio earns no more than 1.2
        np.testing.assert_allclose(loss, -(1.2 * advantage + 1.0) / 2, rtol=1e-6)
        np.testing.assert_array_equal(gradient, [[0.0, -0.5]])
