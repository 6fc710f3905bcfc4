"""Shaping of scores: from the score of a response to the one that training maximizes.

The order is that of openai/lm-human-preferences (truncation, then a fixed score for a response
without an end), followed by that of trlX (clipping, then scaling). The score of the reference
response is subtracted first, since a penalty of the response is no part of the difference:

    truncate -> score -> subtract the reference's score -> missing EOS -> clip -> scale
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import functional
from rlhf_jax.batches import Rollout
from rlhf_jax.errors import InputError
from rlhf_jax.rollout.settings import SamplingSettings, ShapingSettings


class ScoreStats(NamedTuple):
    """Running statistics of scores, f32[] each.

    Attributes:
      num_scores: their number.
      mean: their mean.
      m2: the sum of their squared deviations from it.
    """

    num_scores: jax.Array
    mean: jax.Array
    m2: jax.Array


def truncate_responses(settings: SamplingSettings, rollout: Rollout) -> Rollout:
    """Responses that end with the first `truncate_token` from position `truncate_after` on.

    The tokens after it become padding: no score reads them and no update trains on them.
    openai/lm-human-preferences hides them from the reward model alone, and trains on them.
    """
    token = _truncate_token_id(settings)
    if token is None:
        return rollout
    shape = rollout.tokens.shape
    is_early = jnp.arange(shape[-1]) < settings.truncate_after
    considered = jnp.where(is_early, -1, rollout.tokens).reshape(-1, shape[-1])
    mask = rollout.mask & functional.response_mask(considered, (token,)).reshape(shape)
    return Rollout(jnp.where(mask, rollout.tokens, 0), mask, jnp.where(mask, rollout.logprobs, 0.0))


def check_stop_tokens(settings: ShapingSettings, stop_token_ids: Sequence[int]) -> None:
    """Raises an InputError if a missing EOS is penalised, and no response can end."""
    if settings.missing_eos_penalty is None and settings.missing_eos_score is None:
        return
    stops_at_eos = settings.stop_at_eos and len(stop_token_ids) > 0
    if not stops_at_eos and settings.truncate_token is None:
        section = settings.section
        raise InputError(
            f"{section}.missing_eos_penalty and {section}.missing_eos_score need responses that "
            f"can end: set {section}.stop_at_eos, and stop_token_ids if you build a step yourself, "
            f"or set {section}.truncate_token, or leave them out."
        )


def shape_scores(
    settings: ShapingSettings, stop_token_ids: Sequence[int], rollout: Rollout, scores: jax.Array
) -> jax.Array:
    """f32[B] or f32[B, K]: scores after the penalty of a missing EOS, and clipping."""
    scores = scores.astype(jnp.float32)
    ended = has_end(settings, stop_token_ids, rollout)
    if settings.missing_eos_penalty is not None:
        scores = scores - jnp.where(ended, 0.0, settings.missing_eos_penalty)
    if settings.missing_eos_score is not None:
        scores = jnp.where(ended, scores, settings.missing_eos_score)
    if settings.cliprange_reward is not None:
        scores = jnp.clip(scores, -settings.cliprange_reward, settings.cliprange_reward)
    return scores


def empty_score_stats() -> ScoreStats:
    """Statistics of no scores."""
    return ScoreStats(*(jnp.zeros((), jnp.float32) for _ in ScoreStats._fields))


def init_score_stats(settings: ShapingSettings) -> ScoreStats | None:
    """`empty_score_stats` for `scale_reward`; None without it."""
    return None if settings.scale_reward is None else empty_score_stats()


def update_score_stats(stats: ScoreStats, scores: jax.Array, valid: jax.Array) -> ScoreStats:
    """Statistics with f32[...] more scores, those where bool[...] `valid` is True.

        mean' = mean + d * m / n'
        m2'   = m2 + sum (scores - batch mean)^2 + d^2 * n * m / n'

    for n scores before, m new ones, n' = n + m, and d the new ones' mean minus the old mean.

    Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances, eq. 2.1 (1979).
    """
    added = jnp.sum(valid, dtype=jnp.float32)
    count = stats.num_scores + added
    difference = functional.masked_mean(scores, valid) - stats.mean
    squares = added * functional.masked_var(scores, valid, unbiased=False)
    share = added / jnp.maximum(count, 1.0)
    return ScoreStats(
        count,
        stats.mean + difference * share,
        stats.m2 + squares + jnp.square(difference) * stats.num_scores * share,
    )


def scale_scores(
    settings: ShapingSettings, stats: ScoreStats | None, scores: jax.Array, valid: jax.Array
) -> tuple[jax.Array, ScoreStats | None, dict[str, jax.Array]]:
    """(scores / deviation, new statistics, metrics); unchanged without `scale_reward`.

    The deviation, with Bessel's correction as in trlX, is that of all scores until now, these
    included ("running"), or that of the first iteration ("ref"). Equal scores are not scaled.

    Args:
      stats: of the scores of earlier iterations.
      scores: f32[B] or f32[B, K].
      valid: bool, of the same shape, False on padding of the batch.

    Raises:
      ValueError: there are no statistics, but the settings need them.
    """
    if settings.scale_reward is None:
        return scores, stats, {}
    if stats is None:
        raise ValueError("the state holds no score_stats: create it with the same settings.")
    updated = update_score_stats(stats, scores, valid)
    if settings.scale_reward == "ref":
        updated = jax.tree.map(lambda x, y: jnp.where(stats.num_scores > 0, x, y), stats, updated)
    deviation = jnp.sqrt(updated.m2 / jnp.maximum(updated.num_scores - 1.0, 1.0))
    # Equal scores differ from their mean by rounding error, which is no deviation to divide by.
    scale = jnp.where(deviation > 1e-6 * jnp.abs(updated.mean), deviation, 1.0)
    unscaled = functional.masked_mean(scores, valid)
    metrics = {"objective/unscaled_scores": unscaled, "objective/score_scale": scale}
    return scores / scale, updated, metrics


def has_end(
    settings: SamplingSettings, stop_token_ids: Sequence[int], rollout: Rollout
) -> jax.Array:
    """bool[B] or bool[B, K]: whether a stop token or the truncation token ended the response.

    A response with replies of an environment also ends before its limit when there are no more.
    """
    is_end = jnp.zeros(rollout.mask.shape, bool)
    for stop in stop_token_ids if settings.stop_at_eos else ():
        is_end |= rollout.tokens == stop
    token = _truncate_token_id(settings)
    if token is not None:
        is_late = jnp.arange(rollout.tokens.shape[-1]) >= settings.truncate_after
        is_end |= (rollout.tokens == token) & is_late
    is_end &= rollout.mask
    if rollout.acted is not None:
        return is_end[..., -1] | ~rollout.mask[..., -1]
    return is_end.any(axis=-1)


def _truncate_token_id(settings: SamplingSettings) -> int | None:
    if isinstance(settings.truncate_token, str):
        raise InputError(
            f"{settings.section}.truncate_token is the text {settings.truncate_token!r}, but a "
            "step knows no tokenizer; give it the token's id."
        )
    return settings.truncate_token
