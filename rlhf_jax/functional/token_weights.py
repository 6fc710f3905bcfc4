"""Weights of tokens in a policy loss: off-policy correction, and selection by entropy."""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.expect import expect_one_of, expect_positive, expect_scalars
from rlhf_jax.functional.kl import limited_exp
from rlhf_jax.functional.masking import batch_mean, count_or_one, masked_tokens, on_all_devices

IMPORTANCE_LEVELS = ("token", "sequence")
IMPORTANCE_MODES = ("truncate", "mask")


def importance_weights(
    logprobs, sampler_logprobs, mask, *, level, cap, mode="truncate", denominator=None
):
    """Weights of tokens that another distribution sampled than the one that trains.

        w_t = exp(logprobs_t - sampler_logprobs_t)            level "token"
        w_t = exp(sum_s (logprobs_s - sampler_logprobs_s))    level "sequence"

        mode "truncate": min(w_t, cap)        mode "mask": w_t if w_t <= cap else 0

    They correct a policy gradient for the difference between sampler and policy: other kernels or
    dtypes, an older policy, top-k or top-p. The sequence's weight is unbiased without a cap; the
    token's ignores how the distribution of the prefix differs, with less variance. A token that the
    sampler cannot give, one outside of top-k, has no weight that makes up for it.

    Args:
      logprobs: float[B, T] of the sampled tokens under the policy at the start of the update, in
        nats; the `old_logprobs` of the loss.
      sampler_logprobs: float[B, T], the same under the distribution that sampled them.
      mask: bool[B, T], True on real tokens.
      level: "token" or "sequence".
      cap: the largest weight, above 0.
      mode: "truncate" or "mask".
      denominator: divisor of the metrics `mean` and `capfrac`, instead of the number of real tokens
        ("token") or of responses with one ("sequence"), for a part of a batch.

    Returns:
      (weights, metrics): f32[B, T] without a gradient, zero off the mask, and f32[] each: `min`,
      `mean` and `max` of the weights, over real tokens or over responses with a real token, and
      `capfrac`, the share above the cap. All are 0 if no token is real. A weight is limited to
      e^40.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, an unknown level or mode, or a
        cap of 0 or less, if it is not traced.

    Truncation: Ionides, Truncated Importance Sampling (Journal of Computational and Graphical
    Statistics 17, 2008). The four pairs of level and mode are TRL's
    `vllm_importance_sampling_mode`.

    >>> weights, metrics = importance_weights(
    ...     jnp.log(jnp.array([[0.5, 0.8]])), jnp.log(jnp.array([[0.25, 0.1]])),
    ...     jnp.array([[True, True]]), level="token", cap=3.0)
    >>> print(weights, metrics["capfrac"])
    [[2. 3.]] 0.5
    """
    logprobs, sampler_logprobs = masked_tokens(
        mask, logprobs=logprobs, sampler_logprobs=sampler_logprobs
    )
    expect_one_of(level=(level, IMPORTANCE_LEVELS), mode=(mode, IMPORTANCE_MODES))
    expect_positive(cap=cap)
    log_weights = jax.lax.stop_gradient(logprobs - sampler_logprobs)
    if level == "sequence":
        log_weights = jnp.broadcast_to(jnp.sum(log_weights, axis=1, keepdims=True), mask.shape)
    weights = limited_exp(log_weights)
    is_capped = weights > cap
    weights = jnp.where(is_capped, cap if mode == "truncate" else 0.0, weights)
    # The first token of a response stands for all of them.
    counted = mask if level == "token" else mask & (jnp.cumsum(mask, axis=1) == 1)
    any_counted = jnp.any(counted)
    lowest = jnp.min(weights, where=counted, initial=jnp.inf)
    metrics = {
        "min": jnp.where(any_counted, lowest, 0.0),
        "mean": batch_mean(weights, counted, denominator),
        "max": jnp.max(weights, where=counted, initial=0.0),
        "capfrac": batch_mean(is_capped, counted, denominator),
    }
    return jnp.where(mask, weights, 0.0), metrics


def logprob_difference(logprobs, other_logprobs, mask, *, denominator=None):
    """Mean and largest distance between log-probabilities of the same tokens.

        mean_t |logprobs_t - other_logprobs_t|,     max_t |logprobs_t - other_logprobs_t|

    Of the sampler's and the policy's it shows how far sampling and training disagree, before any
    update: TRL's `sampling/sampling_logp_difference/{mean,max}`.

    Args:
      logprobs: float[B, T] of the sampled tokens, in nats.
      other_logprobs: float[B, T], the same from elsewhere.
      mask: bool[B, T], True on real tokens.
      denominator: divisor of the sum, instead of the number of real tokens.

    Returns:
      (mean, maximum), f32[] each without a gradient, in nats; 0 if no token is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> mean, maximum = logprob_difference(
    ...     jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -2.0]]), jnp.array([[True, True]]))
    >>> print(mean, maximum)
    0.25 0.5
    """
    logprobs, other_logprobs = masked_tokens(mask, logprobs=logprobs, other_logprobs=other_logprobs)
    distance = jnp.abs(jax.lax.stop_gradient(logprobs - other_logprobs))
    return batch_mean(distance, mask, denominator), jnp.max(distance, initial=0.0)


def top_entropy_mask(entropy, mask, *, share):
    """Mask of the tokens with the highest entropy, those that decide between continuations.

        mask_t and entropy_t >= quantile of the real tokens' entropies at 1 - share

    The quantile is interpolated between neighbours, and tokens equal to it are in the mask. It is
    over the batch: use the full one, not a micro-batch.

    Args:
      entropy: float[B, T] of the policy's distribution of each token, in nats.
      mask: bool[B, T], True on real tokens.
      share: of the real tokens that stay in the mask, from 0 to 1; TRL's `top_entropy_quantile`.

    Returns:
      bool[B, T].

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Wang et al., Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement
    Learning for LLM Reasoning, section 5 (arXiv:2506.01939), with a share of 0.2.

    >>> mask = jnp.array([[True, True, True, True, False]])
    >>> print(top_entropy_mask(jnp.array([[0.1, 2.0, 0.3, 1.0, 9.0]]), mask, share=0.4))
    [[False  True False  True False]]
    """
    (entropy,) = masked_tokens(mask, entropy=entropy)
    expect_scalars(share=share)
    if mask.size == 0:
        return mask
    real_or_last = jnp.where(mask, entropy, jnp.inf)
    ordered = jnp.sort(on_all_devices(real_or_last).reshape(-1))
    place = (1.0 - jnp.asarray(share, jnp.float32)) * (count_or_one(jnp.sum(mask)) - 1.0)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.ceil(place).astype(jnp.int32)]
    threshold = low + (place - below) * jnp.where(high > low, high - low, 0.0)
    return mask & (entropy >= threshold)
