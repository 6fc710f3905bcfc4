"""Policy-gradient losses, and the value loss of PPO."""

import numbers

import jax.numpy as jnp
from jax import lax

from rlhf_jax.functional.expect import expect_scalars
from rlhf_jax.functional.kl import exp_minus_linear, limited_exp
from rlhf_jax.functional.masking import batch_mean, masked_tokens


def ppo_policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    clip_range=0.2,
    clip_range_high=None,
    dual_clip=None,
    denominator=None,
):
    """PPO's clipped surrogate loss, a mean over real tokens.

        r_t    = exp(logprobs_t - old_logprobs_t)
        loss_t = max(-A_t * r_t, -A_t * clip(r_t, 1 - clip_range, 1 + clip_range_high))
        loss_t = min(loss_t, -A_t * dual_clip)        where A_t < 0, with a dual_clip

    r_t is limited to e^40, within the range of float32; beyond it the gradient is 0.

    Args:
      logprobs: float[B, T] of the sampled tokens under the policy in training, in nats.
      old_logprobs: float[B, T], the same under the policy that sampled them, without a gradient;
        None: on-policy, `stop_gradient(logprobs)`. With `logprobs` itself as the old ones the
        gradient is 0.
      advantages: float[B, T].
      mask: bool[B, T], True on real tokens.
      clip_range: distance of the ratio below 1 beyond which the surrogate is clipped.
      clip_range_high: the same above 1; None: clip_range. DAPO uses 0.28.
      dual_clip: the largest ratio that raises the loss of a negative advantage, above 1; None: no
        limit.
      denominator: divisor of the sums, instead of the number of real tokens.

    Returns:
      (loss, metrics), f32[] each; metrics `clipfrac`, the share of tokens in which the clipped
      term is the larger one, `approxkl`, half the mean square of the log-ratio, and `ratio`, the
      mean of r_t. All are 0 if no token is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, or a dual_clip of 1 or less,
        if it is not traced.

    Schulman et al., Proximal Policy Optimization Algorithms, eq. 7 (arXiv:1707.06347); two ranges:
    Yu et al., DAPO, section 3.1 (arXiv:2503.14476); dual clip: Ye et al., Mastering Complex Control
    in MOBA Games with Deep Reinforcement Learning (arXiv:1912.09729).

    >>> loss, metrics = ppo_policy_loss(
    ...     jnp.log(jnp.array([[0.5, 0.4]])), jnp.log(jnp.array([[0.25, 0.4]])),
    ...     jnp.array([[1.0, 1.0]]), jnp.array([[True, True]]))
    >>> print(loss, metrics["clipfrac"], metrics["ratio"])
    -1.1 0.5 1.5
    """
    old_logprobs = old_or_own(logprobs, old_logprobs)
    logprobs, old_logprobs, advantages = masked_tokens(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    log_ratio = logprobs - old_logprobs
    ratio = limited_exp(log_ratio)
    losses, is_clipped = clipped_losses(ratio, advantages, clip_range, clip_range_high, dual_clip)
    return batch_mean(losses, mask, denominator), {
        "clipfrac": batch_mean(is_clipped, mask, denominator),
        "approxkl": 0.5 * batch_mean(jnp.square(log_ratio), mask, denominator),
        "ratio": batch_mean(ratio, mask, denominator),
    }


def ppo_value_loss(values, old_values, returns, mask, *, clip_range=0.2, denominator=None):
    """PPO's clipped value loss, a mean over real tokens.

        clipped_t = clip(values_t, old_values_t - clip_range, old_values_t + clip_range)
        loss_t    = max((values_t - returns_t)^2, (clipped_t - returns_t)^2) / 2

    Args:
      values: float[B, T] of the value model in training.
      old_values: float[B, T], the values at the time of sampling.
      returns: float[B, T], the targets of the values.
      mask: bool[B, T], True on real tokens.
      clip_range: distance of a value from the old one beyond which it is clipped.
      denominator: divisor of the sums, instead of the number of real tokens.

    Returns:
      (loss, metrics), f32[] each; metric `clipfrac`, the share of tokens in which the clipped
      term is the larger one. Both are 0 if no token is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Not in the PPO paper, but in its code (openai/baselines, ppo2) and in the code of Ziegler et al.
    (openai/lm-human-preferences), which this function follows.

    >>> loss, metrics = ppo_value_loss(
    ...     jnp.array([[1.0]]), jnp.array([[0.0]]), jnp.array([[1.0]]), jnp.array([[True]]))
    >>> print(f"{loss:.2f}", metrics["clipfrac"])
    0.32 1.0
    """
    values, old_values, returns = masked_tokens(
        mask, values=values, old_values=old_values, returns=returns
    )
    expect_scalars(clip_range=clip_range)
    # Not old + clip(new - old), which rounds and would count values inside the range as clipped.
    clipped_values = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    unclipped = jnp.square(values - returns)
    clipped = jnp.square(clipped_values - returns)
    return 0.5 * batch_mean(jnp.maximum(unclipped, clipped), mask, denominator), {
        "clipfrac": batch_mean(clipped > unclipped, mask, denominator),
    }


def kl_penalty_policy_loss(logprobs, old_logprobs, advantages, mask, *, kl_coef, denominator=None):
    """PPO's surrogate loss with a KL penalty instead of clipping, a mean over real tokens.

        r_t    = exp(logprobs_t - old_logprobs_t)
        kl_t   = (r_t - 1) - log r_t
        loss_t = -A_t * r_t + kl_coef * kl_t

    kl_t estimates KL(old || new) from tokens that the old policy sampled, and is never negative.
    r_t is limited to e^40, within the range of float32; beyond it the gradient is 0.

    Args:
      logprobs: float[B, T] of the sampled tokens under the policy in training, in nats.
      old_logprobs: float[B, T], the same under the policy that sampled them; None: on-policy, as
        in `ppo_policy_loss`.
      advantages: float[B, T].
      mask: bool[B, T], True on real tokens.
      kl_coef: the coefficient of the penalty, per nat; `penalty_kl_update` adapts it.
      denominator: divisor of the sums, instead of the number of real tokens.

    Returns:
      (loss, metrics), f32[] each; metrics `kl`, the mean of kl_t in nats, and `ratio`, the mean of
      r_t. All are 0 if no token is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Schulman et al., Proximal Policy Optimization Algorithms, eq. 8 (arXiv:1707.06347), whose KL is
    over the full vocabulary.

    >>> loss, metrics = kl_penalty_policy_loss(
    ...     jnp.log(jnp.array([[0.5, 0.4]])), jnp.log(jnp.array([[0.25, 0.4]])),
    ...     jnp.array([[1.0, 1.0]]), jnp.array([[True, True]]), kl_coef=2.0)
    >>> print(f"{loss:.4f}", f"{metrics['kl']:.4f}", f"{metrics['ratio']:.1f}")
    -1.1931 0.1534 1.5
    """
    old_logprobs = old_or_own(logprobs, old_logprobs)
    logprobs, old_logprobs, advantages = masked_tokens(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    expect_scalars(kl_coef=kl_coef)
    log_ratio = logprobs - old_logprobs
    ratio = limited_exp(log_ratio)
    kl = exp_minus_linear(log_ratio)
    return batch_mean(kl_coef * kl - advantages * ratio, mask, denominator), {
        "kl": batch_mean(kl, mask, denominator),
        "ratio": batch_mean(ratio, mask, denominator),
    }


def reinforce_loss(logprobs, advantages, mask, *, denominator=None):
    """The policy gradient as a loss, a mean over real tokens.

        loss_t = -A_t * logprobs_t

    Args:
      logprobs: float[B, T] of the sampled tokens under the policy in training, in nats.
      advantages: float[B, T].
      mask: bool[B, T], True on real tokens.
      denominator: divisor of the sums, instead of the number of real tokens.

    Returns:
      (loss, metrics): f32[], 0 if no token is real, and no metrics.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
    Learning, eq. 5 (Machine Learning 8, 1992).

    >>> loss, _ = reinforce_loss(
    ...     jnp.array([[-1.0, -3.0]]), jnp.array([[2.0, 9.0]]), jnp.array([[True, False]]))
    >>> print(loss)
    2.0
    """
    logprobs, advantages = masked_tokens(mask, logprobs=logprobs, advantages=advantages)
    return batch_mean(-advantages * logprobs, mask, denominator), {}


def old_or_own(logprobs, old_logprobs):
    """The old log-probabilities; without them, those of the policy in training as constants."""
    return lax.stop_gradient(logprobs) if old_logprobs is None else old_logprobs


def clipped_losses(ratio, advantages, clip_range, clip_range_high, dual_clip):
    """(loss of each token, whether the clipped term is the larger one)."""
    expect_scalars(clip_range=clip_range, clip_range_high=clip_range_high, dual_clip=dual_clip)
    high = clip_range if clip_range_high is None else clip_range_high
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_range, 1.0 + high)
    losses = jnp.maximum(unclipped, clipped)
    if dual_clip is not None:
        if isinstance(dual_clip, numbers.Real) and dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, but is {dual_clip}.")
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -advantages * dual_clip), losses)
    return losses, clipped > unclipped
