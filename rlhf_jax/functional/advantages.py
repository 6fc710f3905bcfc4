"""From scores and log-probabilities to rewards, returns and advantages."""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.expect import expect, expect_one_of
from rlhf_jax.functional.kl import KINDS, kl_estimate
from rlhf_jax.functional.masking import zero_off_mask


def token_rewards(scores, logprobs, ref_logprobs, mask, *, kl_coef, kl_kind="k1"):
    """Per-token rewards: a penalty on the KL to the reference, and the score at the end.

        r_t = -kl_coef * kl_t + score * [t is the last real token]

    Args:
      scores: float[B], one per response.
      logprobs: float[B, T] of the sampled tokens under the policy, in nats.
      ref_logprobs: float[B, T], the same under the reference.
      mask: bool[B, T], True then False.
      kl_coef: the coefficient of the penalty, per nat.
      kl_kind: the estimate of the KL, as in `kl_estimate`.

    Returns:
      (rewards, kl), f32[B, T] each, zero off the mask. A row without a real token gets no score.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, or an unknown kind.

    Ziegler et al., Fine-Tuning Language Models from Human Preferences, eq. 2 (arXiv:1909.08593).

    >>> rewards, kl = token_rewards(
    ...     jnp.array([1.0]), jnp.array([[-1.0, -1.0, 0.0]]), jnp.array([[-2.0, -1.0, 0.0]]),
    ...     jnp.array([[True, True, False]]), kl_coef=0.5)
    >>> print(rewards, kl)
    [[-0.5  1.   0. ]] [[1. 0. 0.]]
    """
    expect(
        logprobs=(logprobs, "BT", float),
        ref_logprobs=(ref_logprobs, "BT", float),
        mask=(mask, "BT", bool),
        scores=(scores, "B", float),
    )
    expect_one_of(kl_kind=(kl_kind, KINDS))
    logprobs, ref_logprobs = zero_off_mask(mask, logprobs, ref_logprobs)
    kl = kl_estimate(logprobs, ref_logprobs, kl_kind)
    positions = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, positions, -1), axis=1, keepdims=True)
    (final,) = zero_off_mask(positions == last, scores[:, None])
    return final - kl_coef * kl, kl


def gae(rewards, values, mask, *, gamma=1.0, lam=0.95):
    """Generalized advantage estimates of right-padded responses.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1},     A_T = V_T = 0

    Args:
      rewards: float[B, T] per-token rewards.
      values: float[B, T] value of the state in which token t is chosen.
      mask: bool[B, T], True then False.
      gamma: the discount per token.
      lam: 0 trusts the values alone, 1 the rewards alone.

    Returns:
      (advantages, returns), f32[B, T] each, zero off the mask; returns = advantages + values.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Schulman et al., High-Dimensional Continuous Control Using GAE, eq. 16 (arXiv:1506.02438).

    >>> rewards, values = jnp.array([[0.0, 1.0, jnp.nan]]), jnp.array([[0.5, 0.5, jnp.nan]])
    >>> advantages, returns = gae(rewards, values, jnp.array([[True, True, False]]), lam=0.5)
    >>> print(advantages, returns)
    [[0.25 0.5  0.  ]] [[0.75 1.   0.  ]]
    """
    expect(rewards=(rewards, "BT", float), values=(values, "BT", float), mask=(mask, "BT", bool))
    rewards, values = zero_off_mask(mask, rewards, values)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * next_values - values
    advantages = _discounted_sums(deltas, gamma * lam)
    return zero_off_mask(mask, advantages, advantages + values)


def rewards_to_go(rewards, mask, *, gamma=1.0):
    """Discounted sum of the rewards from each token on.

        G_t = r_t + gamma * G_{t+1},     G_T = 0

    Args:
      rewards: float[B, T] per-token rewards.
      mask: bool[B, T], True then False.
      gamma: the discount per token.

    Returns:
      f32[B, T], zero off the mask.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(rewards_to_go(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[True, True, False]])))
    [[3. 2. 0.]]
    """
    expect(rewards=(rewards, "BT", float), mask=(mask, "BT", bool))
    (rewards,) = zero_off_mask(mask, rewards)
    return zero_off_mask(mask, _discounted_sums(rewards, gamma))[0]


def _discounted_sums(x, decay):
    """y_t = x_t + decay * y_{t+1} along the last axis of f32[B, T]."""
    decay = jnp.asarray(decay, jnp.float32)

    def step(total, x_t):
        total = x_t + decay * total
        return total, total

    # zeros_like and not zeros: the carry has to keep the batch's sharding.
    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.T, reverse=True)[1].T
