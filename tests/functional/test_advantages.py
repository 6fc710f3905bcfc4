"""Rewards, returns and advantages against loops."""

import jax
import numpy as np
import pytest

import rlhf_jax as rlhf


def rewards_by_loop(scores, kl, mask, kl_coef):
    rewards = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        for t in range(int(row.sum())):
            rewards[b, t] = -kl_coef * kl[b, t]
        if row.any():
            rewards[b, int(row.sum()) - 1] += scores[b]
    return rewards


def gae_by_loop(rewards, values, mask, gamma, lam):
    advantages = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        advantage = next_value = 0.0
        for t in reversed(range(int(row.sum()))):
            delta = rewards[b, t] + gamma * next_value - values[b, t]
            advantage = delta + gamma * lam * advantage
            next_value = values[b, t]
            advantages[b, t] = advantage
    return advantages, np.where(mask, advantages + values, 0.0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_token_rewards_match_a_loop(rng, ragged_mask, kind):
    logprobs, ref = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)
    scores = rng.normal(size=5).astype(np.float32)
    rewards, kl = rlhf.token_rewards(scores, logprobs, ref, ragged_mask, kl_coef=0.3, kl_kind=kind)
    d = np.float64(logprobs) - np.float64(ref)
    expected = np.where(ragged_mask, {"k1": d, "k2": d**2 / 2, "k3": np.expm1(-d) + d}[kind], 0.0)
    np.testing.assert_allclose(kl, expected, rtol=2e-5, atol=1e-6)
    by_loop = rewards_by_loop(scores, expected, ragged_mask, 0.3)
    np.testing.assert_allclose(rewards, by_loop, rtol=2e-5, atol=1e-6)


def test_the_score_lands_once_even_if_the_mask_has_a_hole():
    mask = np.array([[True, False, True, False]])
    zeros = np.zeros((1, 4), np.float32)
    rewards, _ = rlhf.token_rewards(np.float32([2.5]), zeros, zeros, mask, kl_coef=0.1)
    np.testing.assert_array_equal(rewards, [[0, 0, 2.5, 0]])


def test_the_score_of_an_empty_response_has_no_effect():
    zeros, mask = np.zeros((1, 3), np.float32), np.zeros((1, 3), bool)
    rewards, _ = rlhf.token_rewards(np.float32([np.nan]), zeros, zeros, mask, kl_coef=0.1)
    np.testing.assert_array_equal(rewards, zeros)


def test_an_unknown_kind_is_named():
    zeros, mask = np.zeros((1, 3), np.float32), np.ones((1, 3), bool)
    with pytest.raises(ValueError, match="^kl_kind must be one of 'k1', 'k2', 'k3', but is 'mse'"):
        rlhf.token_rewards(zeros[:, 0], zeros, zeros, mask, kl_coef=0.1, kl_kind="mse")


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.0), (0.0, 0.9), (0.99, 0.95)])
def test_gae_matches_a_loop(rng, ragged_mask, gamma, lam):
    rewards, values = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)
    outputs = rlhf.gae(rewards, values, ragged_mask, gamma=gamma, lam=lam)
    expected = gae_by_loop(rewards, values, ragged_mask, gamma, lam)
    for output, by_loop in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output, by_loop, rtol=1e-5, atol=1e-6)


def test_gae_defaults(rng, ragged_mask):
    rewards, values = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)
    advantages, _ = rlhf.gae(rewards, values, ragged_mask)
    by_loop, _ = gae_by_loop(rewards, values, ragged_mask, 1.0, 0.95)
    np.testing.assert_allclose(advantages, by_loop, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_rewards_to_go_are_the_returns_of_gae_with_lambda_one(rng, ragged_mask, gamma):
    rewards, values = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)
    expected = np.zeros(ragged_mask.shape)
    for b, t in zip(*np.nonzero(ragged_mask), strict=True):
        length = int(ragged_mask[b].sum())
        expected[b, t] = sum(gamma ** (s - t) * rewards[b, s] for s in range(t, length))
    to_go = rlhf.rewards_to_go(rewards, ragged_mask, gamma=gamma)
    np.testing.assert_allclose(to_go, expected, rtol=1e-5, atol=1e-6)
    _, returns = rlhf.gae(rewards, values, ragged_mask, gamma=gamma, lam=1.0)
    np.testing.assert_allclose(returns, to_go, rtol=1e-4, atol=1e-5)


def test_gamma_and_lambda_can_be_mapped_over(rng, ragged_mask):
    rewards, values = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)
    gammas, lams = np.float32([0.9, 1.0]), np.float32([0.5, 0.95])
    mapped, _ = jax.vmap(
        lambda gamma, lam: rlhf.gae(rewards, values, ragged_mask, gamma=gamma, lam=lam)
    )(gammas, lams)
    for advantages, gamma, lam in zip(mapped, gammas, lams, strict=True):
        expected, _ = gae_by_loop(rewards, values, ragged_mask, gamma, lam)
        np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
