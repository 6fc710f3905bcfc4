"""Targets and losses of GRPO and its relatives: from scores to advantages, and to a loss.

The settings choose among functions of `rlhf_jax.functional`; no model is run here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import functional
from rlhf_jax.batches import Rollout, ScoredRollout
from rlhf_jax.functional.masking import batch_mean
from rlhf_jax.rollout.shaping import shape_scores
from rlhf_jax.training.epochs import Metrics
from rlhf_jax.training.grpo_settings import Settings

# loss_type -> (kind, reduction) of `functional.grpo_loss`.
_KINDS = {
    "grpo": ("clip", "sequence"),
    "dr_grpo": ("clip", "constant"),
    "dapo": ("clip", "token"),
    "bnpo": ("clip", "token"),
    "luspo": ("clip", "constant"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
    "rloo": ("clip", "sequence"),
}


class Targets(NamedTuple):
    """The responses of an iteration as the loss reads them, arrays [B, ...].

    Attributes:
      rollout: with arrays of tokens [B, K, T]; log-probabilities are those of the policy before the
        first update with `settings.scores_policy`, else those of the sampler.
      advantages: f32[B, K], or f32[B, K, T] where they differ between tokens.
      loss_mask: bool[B, K, T], the mask without responses that are left out of the loss.
      sampler_logprobs: f32[B, K, T], of the distribution that was sampled from.
      selected: f32[B, K, T], 1 on the tokens of high entropy that the policy's loss trains on, 0 on
        others; None where all are.
      states: of `online.Experience`.
    """

    rollout: ScoredRollout
    advantages: jax.Array
    loss_mask: jax.Array
    sampler_logprobs: jax.Array
    selected: jax.Array | None
    states: jax.Array | None


def final_scores(
    settings: Settings, stop_token_ids: Sequence[int], rollout: Rollout, scores: jax.Array
) -> jax.Array:
    """f32[B, K]: scores after all penalties and clipping, before they are scaled."""
    scores = shape_scores(settings, stop_token_ids, rollout, scores)
    if settings.overlong_buffer is None:
        return scores
    lengths = jnp.sum(rollout.mask, axis=-1, dtype=jnp.int32)
    limits = {"max_length": settings.response_length, "buffer": settings.overlong_buffer}
    return scores + settings.overlong_penalty * functional.overlong_penalty(lengths, **limits)


def response_advantages(
    settings: Settings,
    rollout: ScoredRollout,
    loss_mask: jax.Array,
    parts: jax.Array | None = None,
    weights: tuple[float, ...] = (),
) -> jax.Array:
    """Advantages f32[B, K] of responses, or f32[B, K, T] of their tokens.

    A KL in the reward is subtracted from the score of a response, as a sum over its tokens; with
    the estimators "reinforce_pp" and "reinforce_pp_baseline" a token has the KL from its own on.

    Args:
      rollout: with final scores.
      loss_mask: bool[B, K, T], the tokens that statistics of "reinforce_pp" are over.
      parts, weights: f32[B, K, R] and their R weights, where each reward is normalized apart.
    """
    estimator, scores = settings.advantage_estimator, rollout.scores
    if parts is not None:
        is_known = jnp.isfinite(parts)
        return functional.decoupled_advantages(parts, jnp.asarray(weights), is_known)
    if estimator.startswith("reinforce_pp"):
        if estimator == "reinforce_pp_baseline":
            scores = functional.group_advantages(scores, scale="none")
        return _token_advantages(settings, rollout, scores, loss_mask)
    if settings.has_kl_in_reward:
        scores = scores - settings.beta * jnp.sum(_kl(settings, rollout), axis=-1)
    if estimator == "grpo":
        return functional.group_advantages(scores, scale=settings.scale_rewards)
    advantages = functional.leave_one_out_advantages(scores)
    if not settings.normalize_advantages:
        return advantages
    return functional.normalize_advantages(advantages, rollout.mask.any(axis=-1))


def _token_advantages(settings, rollout, scores, loss_mask):
    """Scores and the KL to come of each token, normalized over the tokens of the batch."""
    has_kl = settings.has_kl_in_reward
    arrays = (rollout.logprobs, rollout.ref_logprobs if has_kl else rollout.logprobs, rollout.mask)
    rewards, _ = functional.token_rewards(
        scores.reshape(-1),
        *(_flat(x) for x in arrays),
        kl_coef=settings.beta if has_kl else 0.0,
        kl_kind=settings.kl_estimator,
    )
    returns = functional.rewards_to_go(rewards, _flat(rollout.mask))
    return functional.normalize_advantages(returns.reshape(rollout.mask.shape), loss_mask)


def _kl(settings, rollout):
    """f32[B, K, T]: the estimate of the KL of each token, in nats."""
    return functional.kl_estimate(rollout.logprobs, rollout.ref_logprobs, settings.kl_estimator)


def reward_kl(settings: Settings, rollout: ScoredRollout) -> jax.Array:
    """f32[]: the KL in the reward, in nats per response, as TRL's RLOO logs it."""
    valid = rollout.mask.any(axis=-1)
    return functional.masked_mean(jnp.sum(_kl(settings, rollout), axis=-1), valid)


def selected_tokens(
    settings: Settings, entropy: jax.Array, loss_mask: jax.Array
) -> jax.Array | None:
    """f32[B, K, T], 1 on tokens of high entropy; None where all are trained on."""
    if settings.top_entropy_quantile == 1:
        return None
    shape = loss_mask.shape
    entropy, mask = (x.reshape(-1, shape[-1]) for x in (entropy, loss_mask))
    selected = functional.top_entropy_mask(entropy, mask, share=settings.top_entropy_quantile)
    return selected.reshape(shape).astype(jnp.float32)


def count(targets: Targets) -> tuple[jax.Array, jax.Array]:
    """f32[] each: the responses and the tokens that losses are means over.

    Responses without a token in the loss mask count as responses, as in TRL.
    """
    responses = targets.rollout.mask.any(axis=-1)
    return jnp.sum(responses, dtype=jnp.float32), jnp.sum(targets.loss_mask, dtype=jnp.float32)


def policy_loss(
    settings: Settings,
    logprobs: jax.Array,
    entropy: jax.Array,
    targets: Targets,
    counts: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, Metrics]:
    """(loss, metrics) of the policy, f32[] each; metrics under TRL's names.

    Metrics are means over tokens, of the loss "rloo" over responses; those that end in "/min" and
    "/max" are extremes.

    Args:
      logprobs, entropy: f32[B, K, T] of the policy in training, in nats.
      counts: `count` of the full batch, of which the targets may be a part.
    """
    responses, tokens = count(targets) if counts is None else counts
    mask, logprobs, entropy = map(_flat, (targets.loss_mask, logprobs, entropy))
    old = jax.lax.stop_gradient(logprobs)
    if settings.scores_policy:
        old = _flat(targets.rollout.logprobs)
    weights, metrics = _weights(settings, old, targets, responses, tokens)
    metrics["entropy"] = batch_mean(entropy, mask, tokens)
    in_loss = settings.has_reference and not settings.has_kl_in_reward
    ref = _flat(targets.rollout.ref_logprobs) if in_loss else None
    advantages = _flat(targets.advantages, axes=2)
    units = tokens
    if settings.loss_type == "rloo":
        logprobs, old = (
            jnp.sum(jnp.where(mask, x, 0.0), 1, keepdims=True) for x in (logprobs, old)
        )
        weights = None if weights is None else jnp.max(weights, axis=1, keepdims=True)
        mask, units = mask.any(axis=1, keepdims=True), responses
    kind, reduction = _KINDS[settings.loss_type]
    arguments = _arguments(settings, weights, ref, entropy)
    denominators = {
        "sequence": responses,
        "token": tokens,
        "constant": responses * arguments["max_length"],
    }
    loss, _ = functional.grpo_loss(
        *(logprobs, old, advantages, mask),
        **arguments,
        reduction=reduction,
        denominator=denominators[reduction],
    )
    # The compiler merges this with the call above.
    _, by_token = functional.grpo_loss(
        *(logprobs, old, advantages, mask), **arguments, reduction="token", denominator=units
    )
    if ref is not None:
        metrics["kl"] = by_token["kl"]
    if settings.updates_per_iteration > 1:
        metrics["policy/approxkl_avg"] = by_token["approxkl"]
    return loss, {"train/loss": loss, **metrics, **_clip_metrics(kind, by_token)}


def _arguments(settings, weights, ref_logprobs, entropy):
    """Keyword arguments of `functional.grpo_loss`, but for reduction and denominator."""
    kind, _ = _KINDS[settings.loss_type]
    high = settings.epsilon_high
    return {
        "kind": kind,
        "level": settings.importance_sampling_level,
        "clip_range": settings.epsilon,
        "clip_range_high": high - 1.0 if kind == "cispo" and high is not None else high,
        "dual_clip": settings.delta,
        "temperature_pos": settings.sapo_temperature_pos,
        "temperature_neg": settings.sapo_temperature_neg,
        "weights": weights,
        "ref_logprobs": ref_logprobs,
        "kl_coef": 0.0 if ref_logprobs is None else settings.beta,
        "kl_kind": settings.kl_estimator,
        "kl_bias_correction": settings.use_bias_correction_kl,
        "entropy": entropy if settings.entropy_coef else None,
        "entropy_coef": settings.entropy_coef,
        "max_length": 1 if settings.loss_type == "luspo" else settings.response_length,
    }


def _clip_metrics(kind, by_token):
    if kind == "clip":
        return {
            "clip_ratio/low_mean": by_token["clipfrac_low"],
            "clip_ratio/high_mean": by_token["clipfrac_high"],
            "clip_ratio/region_mean": by_token["clipfrac"],
        }
    return {"cispo_clip_ratio": by_token["clipfrac_high"]} if kind == "cispo" else {}


def _weights(settings, old, targets, responses, tokens):
    """(factors f32[B * K, T] of the surrogate or None, metrics `sampling/...`)."""
    mask, sampler = _flat(targets.loss_mask), _flat(targets.sampler_logprobs)
    _, largest = functional.logprob_difference(old, sampler, mask)
    name = "sampling/sampling_logp_difference"
    metrics = {
        f"{name}/mean": batch_mean(jnp.abs(old - sampler), mask, tokens),
        f"{name}/max": largest,
    }
    selected = None if targets.selected is None else _flat(targets.selected)
    if settings.importance_sampling_mode is None:
        return selected, metrics
    level, _, mode = settings.importance_sampling_mode.partition("_")
    weights, ratio = functional.importance_weights(
        old, sampler, mask, level=level, cap=settings.importance_sampling_cap, mode=mode
    )
    mean = batch_mean(weights, mask, tokens)
    if level == "sequence":
        mean = batch_mean(jnp.max(weights, axis=1), mask.any(axis=1), responses)
    name = "sampling/importance_sampling_ratio"
    metrics |= {f"{name}/min": ratio["min"], f"{name}/mean": mean, f"{name}/max": ratio["max"]}
    return weights if selected is None else weights * selected, metrics


def _flat(array, axes=2):
    """[B, K, ...] as [B * K, ...]."""
    return array.reshape(-1, *array.shape[axes:])
