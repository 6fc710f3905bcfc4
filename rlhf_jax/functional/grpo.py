"""The losses of GRPO and of its successors: DAPO, Dr. GRPO, GSPO, CISPO, SAPO."""

import numbers

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.functional.expect import expect, expect_one_of, expect_positive, expect_scalars
from rlhf_jax.functional.kl import KINDS as KL_KINDS
from rlhf_jax.functional.kl import kl_estimate, limited_exp
from rlhf_jax.functional.masking import count_or_one, masked_mean, zero_off_mask
from rlhf_jax.functional.policy import clipped_losses, old_or_own

KINDS = ("clip", "cispo", "sapo")
LEVELS = ("token", "sequence", "sequence_token")
REDUCTIONS = ("sequence", "token", "constant")


def grpo_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    kind="clip",
    level="token",
    reduction="sequence",
    clip_range=0.2,
    clip_range_high=None,
    dual_clip=None,
    temperature_pos=1.0,
    temperature_neg=1.05,
    weights=None,
    ref_logprobs=None,
    kl_coef=0.0,
    kl_kind="k3",
    kl_bias_correction=False,
    entropy=None,
    entropy_coef=0.0,
    max_length=None,
    denominator=None,
):
    """A surrogate loss with one advantage per response, a KL penalty and an entropy bonus.

        loss_t = weight_t * surrogate_t + kl_coef * kl_t - entropy_coef * entropy_t
        d_t    = logprobs_t - old_logprobs_t

        r_t = exp(d_t)                     level "token"
        r_t = exp(mean_t d_t)              level "sequence"          (GSPO)
        r_t = the same, with the gradient of A * r_t * logprobs_t
                                           level "sequence_token"    (GSPO-token)

        surrogate_t = `ppo_policy_loss` of A and r_t                      kind "clip"
        surrogate_t = -sg(min(r_t, 1 + clip_range_high)) * A * logprobs_t   kind "cispo"
        surrogate_t = -A * 4 / tau * sigmoid(tau * (r_t - 1))             kind "sapo"
                      tau = temperature_pos if A > 0 else temperature_neg

        kl_t = kl_estimate(logprobs_t, ref_logprobs_t, kl_kind)   (* r_t, kl_bias_correction)

        reduction "sequence"   mean over responses of the mean over tokens   (GRPO, GSPO, SAPO)
                  "token"      mean over tokens                              (DAPO, CISPO)
                  "constant"   sum over tokens / (B * max_length)            (Dr. GRPO)

    sg is `stop_gradient`. r_t and kl_t are limited to e^40, within the range of float32;
    beyond it the gradient is 0.

    On-policy the penalty has, for each token given its prefix, the expected gradient of
    KL(ref || policy) with "k3", as published, of KL(policy || ref) with "k2", and none with "k1".
    With `kl_bias_correction` and level "token" that of "k1" and "k3" is the gradient of
    KL(policy || ref), off-policy too. All leave out how the policy changes the distribution of the
    prefix.

    Args:
      logprobs: float[B, T] of the sampled tokens under the policy in training, in nats.
      old_logprobs: float[B, T], the same under the policy that sampled them; None: on-policy, as
        in `ppo_policy_loss`.
      advantages: float[B], one per response: `group_advantages(scores).reshape(-1)`; or
        float[B, T], one per token.
      mask: bool[B, T], True on real tokens.
      kind: "clip", "cispo" or "sapo".
      level: "token", "sequence" or "sequence_token".
      reduction: "sequence", "token" or "constant".
      clip_range, clip_range_high, dual_clip: as in `ppo_policy_loss`; "cispo" reads
        clip_range_high alone, which is TRL's `epsilon_high` - 1 there, and "sapo" none of them.
      temperature_pos, temperature_neg: steepness of the gate of "sapo", above 0.
      weights: float[B, T], factors of the surrogate without a gradient: `importance_weights`, or
        the mask of `top_entropy_mask` as float; None: 1.
      ref_logprobs: float[B, T] under the reference; None: no penalty.
      kl_coef: the coefficient of the penalty, per nat.
      kl_kind: "k1", "k2" or "k3".
      kl_bias_correction: weights kl_t by r_t, as TRL's `use_bias_correction_kl`.
      entropy: float[B, T] of the policy in training, in nats; None: no bonus.
      entropy_coef: the coefficient of the bonus, per nat.
      max_length: the divisor of a response under "constant", in tokens; None: T. Not the padded
        width, which varies from batch to batch, but the limit of the responses. With 1 and level
        "sequence" the loss is TRL's "luspo".
      denominator: divisor instead of the number of responses with a real token ("sequence"), of
        real tokens ("token"), or of B * max_length ("constant").

    Returns:
      (loss, metrics), f32[] each; metrics `clipfrac`, the share of tokens in which the clipped
      term is the larger one ("clip") or r_t is above its limit ("cispo"), 0 with "sapo",
      `clipfrac_low` and `clipfrac_high`, its parts with A < 0 and A > 0, `approxkl`, half the mean
      square of d_t, `ratio`, the mean of r_t, `kl`, the mean of kl_t in nats, 0 without a
      reference, and `entropy`, 0 where it is not given. Their means exclude padding: under "token"
      they are over all real tokens, else over responses of the mean over tokens. A response
      without a real token contributes 0, and is counted only under "constant", in B. All are 0 if
      no token is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, an unknown kind, level or
        reduction, a dual_clip of 1 or less, a temperature or max_length of 0 or less, or a kl_coef
        or entropy_coef other than 0 without ref_logprobs or entropy. The value of a traced
        coefficient is not known at trace time: if it is not 0, the loss and its gradients are NaN.

    Shao et al., DeepSeekMath, eq. 3 and 4 (arXiv:2402.03300); Yu et al., DAPO, eq. 8
    (arXiv:2503.14476); Liu et al., Understanding R1-Zero-Like Training, section 3.2
    (arXiv:2503.20783); Zheng et al., GSPO, eq. 5, 7 and 13 (arXiv:2507.18071); CISPO: MiniMax-M1,
    eq. 4 (arXiv:2506.13585), without a lower limit, as there in practice; Gao et al., SAPO
    (arXiv:2511.20347); weighted penalty: DeepSeek-AI, DeepSeek-V3.2 (arXiv:2512.02556).

    >>> old = jnp.log(jnp.array([[0.25, 0.4], [0.5, 0.5]]))
    >>> new = jnp.log(jnp.array([[0.5, 0.4], [0.5, 0.5]]))
    >>> advantages, mask = jnp.array([1.0, -1.0]), jnp.array([[True, True], [True, False]])
    >>> for reduction in ("sequence", "token", "constant"):
    ...     loss, metrics = grpo_loss(new, old, advantages, mask, reduction=reduction)
    ...     print(f"{loss:.4f} {metrics['ratio']:.4f}")
    -0.0500 1.2500
    -0.4000 1.3333
    -0.3000 1.2500
    """
    old_logprobs = old_or_own(logprobs, old_logprobs)
    _expect_arrays(logprobs, old_logprobs, advantages, mask, weights, ref_logprobs, entropy)
    expect_one_of(
        kind=(kind, KINDS),
        level=(level, LEVELS),
        reduction=(reduction, REDUCTIONS),
        kl_kind=(kl_kind, KL_KINDS),
    )
    expect_scalars(
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        denominator=denominator,
    )
    expect_positive(
        temperature_pos=temperature_pos, temperature_neg=temperature_neg, max_length=max_length
    )
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy = (
        None if x is None else zero_off_mask(mask, x)[0]
        for x in (logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy)
    )
    ratio = limited_exp(_log_ratio(logprobs, old_logprobs, mask, level))
    if kind == "clip":
        losses, is_clipped = clipped_losses(
            ratio, advantages, clip_range, clip_range_high, dual_clip
        )
    elif kind == "cispo":
        high = clip_range if clip_range_high is None else clip_range_high
        losses, is_clipped = _limited_reinforce(ratio, logprobs, advantages, high)
    else:
        losses = _soft_gated(ratio, advantages, temperature_pos, temperature_neg)
        is_clipped = jnp.zeros_like(mask)
    if weights is not None:
        losses *= weights
    kl = None if ref_logprobs is None else kl_estimate(logprobs, ref_logprobs, kl_kind)
    if kl is not None and kl_bias_correction:
        kl *= ratio
    losses = _plus(losses, "kl_coef", kl_coef, "ref_logprobs", kl)
    bonus = None if entropy is None else -entropy
    losses = _plus(losses, "entropy_coef", entropy_coef, "entropy", bonus)
    loss_weights, metric_weights = _weights(mask, reduction, max_length, denominator)
    metrics = {
        "clipfrac": is_clipped,
        "clipfrac_low": is_clipped & (advantages < 0),
        "clipfrac_high": is_clipped & (advantages > 0),
        "approxkl": 0.5 * jnp.square(logprobs - old_logprobs),
        "ratio": ratio,
        "kl": 0.0 if kl is None else kl,
        "entropy": 0.0 if entropy is None else entropy,
    }
    return jnp.sum(loss_weights * losses), {
        name: jnp.sum(metric_weights * x) for name, x in metrics.items()
    }


def _expect_arrays(logprobs, old_logprobs, advantages, mask, weights, ref_logprobs, entropy):
    expect(
        logprobs=(logprobs, "BT", float),
        old_logprobs=(old_logprobs, "BT", float),
        advantages=(advantages, "BT" if jnp.ndim(advantages) == 2 else "B", float),
        mask=(mask, "BT", bool),
    )
    further = {"weights": weights, "ref_logprobs": ref_logprobs, "entropy": entropy}
    expected = {name: (x, "BT", float) for name, x in further.items() if x is not None}
    expect(logprobs=(logprobs, "BT", float), **expected)


def _log_ratio(logprobs, old_logprobs, mask, level):
    """log r of each token."""
    by_token = logprobs - old_logprobs
    if level == "token":
        return by_token
    mean = masked_mean(by_token, mask, axis=1)[:, None]
    if level == "sequence":
        return jnp.where(mask, mean, 0.0)
    # The difference is 0, and has the gradient of the log-probability.
    return lax.stop_gradient(mean) + (logprobs - lax.stop_gradient(logprobs))


def _limited_reinforce(ratio, logprobs, advantages, high):
    """CISPO's (loss of each token, whether its ratio is above the limit and counts)."""
    limited = lax.stop_gradient(jnp.minimum(ratio, 1.0 + high))
    return -limited * advantages * logprobs, (ratio > 1.0 + high) & (advantages != 0)


def _soft_gated(ratio, advantages, temperature_pos, temperature_neg):
    """SAPO's loss of each token."""
    temperature = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    return -advantages * (4.0 / temperature) * jax.nn.sigmoid(temperature * (ratio - 1.0))


def _plus(losses, coef_name, coef, name, values):
    """losses + coef * values; without values a coefficient other than 0 is a mistake."""
    if values is not None:
        return losses + coef * values
    if isinstance(coef, numbers.Real) and coef != 0:
        raise ValueError(
            f"{name} must be given if {coef_name} is not 0, but {coef_name} is {coef}."
        )
    return losses * jnp.where(coef == 0, 1.0, jnp.nan)


def _weights(mask, reduction, max_length, denominator):
    """Weights of the tokens in the loss and in the metrics: two of f32[B, T], zero off the mask.

    With a `denominator` metrics have to add up over parts of a batch, as the loss does. For
    "constant" that excludes a mean over all real tokens, whose number in the full batch is unknown.
    """
    max_length = mask.shape[1] if max_length is None else max_length
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    if denominator is None:
        counts = {
            "sequence": jnp.sum(lengths > 0),
            "token": jnp.sum(mask),
            "constant": mask.shape[0] * max_length,
        }
        denominator = counts[reduction]
    by_token = mask / count_or_one(denominator)
    by_response = by_token / jnp.maximum(lengths, 1)
    if reduction == "constant":
        return by_token, by_response * max_length
    weights = by_response if reduction == "sequence" else by_token
    return weights, weights
