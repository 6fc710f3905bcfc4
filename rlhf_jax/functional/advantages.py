"""Rewards of tokens, and returns and advantages from them."""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.expect import expect, expect_one_of, expect_scalars
from rlhf_jax.functional.kl import KINDS, kl_estimate
from rlhf_jax.functional.masking import is_last, masked_tokens, zero_off_mask


def token_rewards(scores, logprobs, ref_logprobs, mask, *, kl_coef, kl_kind="k1"):
    """Per-token rewards: a penalty on the KL to the reference, and the score at the end.

        r_t = -kl_coef * kl_t + score * [t is the last real token]

    Args:
      scores: float[B], one per response.
      logprobs: float[B, T] of the sampled tokens under the policy, in nats.
      ref_logprobs: float[B, T], the same under the reference.
      mask: bool[B, T], True on real tokens.
      kl_coef: the coefficient of the penalty, per nat.
      kl_kind: the estimate of the KL, as in `kl_estimate`.

    Returns:
      (rewards, kl), f32[B, T] each, zero off the mask. The score of an empty response is dropped.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, or an unknown kind.

    Ziegler et al., Fine-Tuning Language Models from Human Preferences, eq. 2 (arXiv:1909.08593).

    >>> rewards, kl = token_rewards(
    ...     jnp.array([1.0]), jnp.array([[-1.0, -1.0, 0.0]]), jnp.array([[-2.0, -1.0, 0.0]]),
    ...     jnp.array([[True, True, False]]), kl_coef=0.5)
    >>> print(rewards, kl)
    [[-0.5  1.   0. ]] [[1. 0. 0.]]
    """
    logprobs, ref_logprobs = masked_tokens(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    expect(logprobs=(logprobs, "BT", float), scores=(scores, "B", float))
    expect_one_of(kl_kind=(kl_kind, KINDS))
    expect_scalars(kl_coef=kl_coef)
    kl = kl_estimate(logprobs, ref_logprobs, kl_kind)
    (final,) = zero_off_mask(is_last(mask), scores[:, None])
    return final - kl_coef * kl, kl


def gae(rewards, values, mask, *, gamma=1.0, lam=0.95):
    """Generalized advantage estimates of responses.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1},     A_T = V_T = 0

    where t + 1 is the next real token, across any masked ones between them.

    Args:
      rewards: float[B, T] per-token rewards.
      values: float[B, T] value of the state in which token t is chosen.
      mask: bool[B, T]; masked tokens, such as those of a tool, count as if they were not there.
      gamma: the discount per token.
      lam: 0 gives one-step temporal differences, 1 Monte Carlo returns minus values.

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
    rewards, values = masked_tokens(mask, rewards=rewards, values=values)
    expect_scalars(gamma=gamma, lam=lam)
    gamma, lam = (jnp.asarray(x, jnp.float32) for x in (gamma, lam))

    def step(following, token):
        next_value, next_advantage = following
        reward, value, is_real = token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        own = (jnp.where(is_real, value, next_value), jnp.where(is_real, advantage, next_advantage))
        return own, advantage

    # Derived from the rewards, so that the carry has the sharding of the batch.
    zeros = jnp.zeros_like(jnp.sum(rewards, axis=1))
    tokens = (rewards.T, values.T, mask.T)
    advantages = jax.lax.scan(step, (zeros, zeros), tokens, reverse=True)[1].T
    return zero_off_mask(mask, advantages, advantages + values)


def rewards_to_go(rewards, mask, *, gamma=1.0):
    """Discounted sum of the rewards from each token on.

        G_t = r_t + gamma * G_{t+1},     G_T = 0

    where t + 1 is the next real token, as in `gae`.

    Args:
      rewards: float[B, T] per-token rewards.
      mask: bool[B, T]; masked tokens count as if they were not there.
      gamma: the discount per token.

    Returns:
      f32[B, T], zero off the mask.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(rewards_to_go(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[True, True, False]])))
    [[3. 2. 0.]]
    """
    expect(rewards=(rewards, "BT", float), mask=(mask, "BT", bool))
    # Advantages over values of 0.
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]
