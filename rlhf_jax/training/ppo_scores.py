"""From a score as it was given to the one that PPO is to raise.

The order is that of openai/lm-human-preferences (cut, then a fixed score for what has no end), and
after it that of trlX (clip, then scale). The score of the reference response is taken off as soon
as there are scores, since a price that the response pays is no difference of the two:

    cut -> score -> less the reference's score -> missing EOS -> clip -> scale
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import functional
from rlhf_jax.batches import Rollout
from rlhf_jax.errors import InputError
from rlhf_jax.training.ppo_settings import Settings


class ScoreStats(NamedTuple):
    """What is known of the scores until now, f32[] each.

    Attributes:
      num_scores: how many there were.
      mean: their mean.
      m2: the sum of their squared distances from it.
    """

    num_scores: jax.Array
    mean: jax.Array
    m2: jax.Array


def truncate_responses(settings: Settings, rollout: Rollout) -> Rollout:
    """Responses that are over with the first `truncate_token` from place `truncate_after` on.

    What stood behind it is padding from then on: no score reads it, and nothing is learned from it.
    openai/lm-human-preferences hides it from the reward model alone, and learns from it.
    """
    token = _truncate_token_id(settings)
    if token is None:
        return rollout
    positions = jnp.arange(rollout.tokens.shape[1])
    considered = jnp.where(positions < settings.truncate_after, -1, rollout.tokens)
    mask = rollout.mask & functional.response_mask(considered, (token,))
    return Rollout(jnp.where(mask, rollout.tokens, 0), mask, jnp.where(mask, rollout.logprobs, 0.0))


def check_stop_tokens(settings: Settings, stop_token_ids: Sequence[int]) -> None:
    """Raises an InputError if a missing EOS has a price, and no response can end."""
    if settings.missing_eos_penalty is None and settings.missing_eos_score is None:
        return
    stops_at_eos = settings.stop_at_eos and len(stop_token_ids) > 0
    if not stops_at_eos and settings.truncate_token is None:
        raise InputError(
            "ppo.missing_eos_penalty and ppo.missing_eos_score need responses that can end: set "
            "ppo.stop_at_eos, with stop_token_ids where a step is made by hand, or set "
            "ppo.truncate_token, or leave them out."
        )


def is_ended(settings: Settings, stop_token_ids: Sequence[int], rollout: Rollout) -> jax.Array:
    """bool[B]: whether a response came to an end of its own, by a stop token or by being cut."""
    ends = jnp.zeros(rollout.mask.shape, bool)
    if settings.stop_at_eos:
        for stop in stop_token_ids:
            ends |= rollout.tokens == stop
    token = _truncate_token_id(settings)
    if token is not None:
        late = jnp.arange(rollout.tokens.shape[1]) >= settings.truncate_after
        ends |= (rollout.tokens == token) & late
    return (ends & rollout.mask).any(axis=1)


def shape_scores(
    settings: Settings, stop_token_ids: Sequence[int], rollout: Rollout, scores: jax.Array
) -> jax.Array:
    """f32[B]: scores after what a missing EOS costs, and clipping."""
    scores = scores.astype(jnp.float32)
    if settings.missing_eos_penalty is not None:
        ended = is_ended(settings, stop_token_ids, rollout)
        scores = scores - jnp.where(ended, 0.0, settings.missing_eos_penalty)
    if settings.missing_eos_score is not None:
        ended = is_ended(settings, stop_token_ids, rollout)
        scores = jnp.where(ended, scores, settings.missing_eos_score)
    if settings.cliprange_reward is not None:
        scores = jnp.clip(scores, -settings.cliprange_reward, settings.cliprange_reward)
    return scores


def init_score_stats() -> ScoreStats:
    """Of no scores at all."""
    return ScoreStats(*(jnp.zeros((), jnp.float32) for _ in ScoreStats._fields))


def update_score_stats(stats: ScoreStats, scores: jax.Array, rows: jax.Array) -> ScoreStats:
    """With f32[B] more scores, of which those in bool[B] rows count.

        mean' = mean + d * m / n'
        m2'   = m2 + sum (scores - batch mean)^2 + d^2 * n * m / n'

    n scores until now, m new ones, n' = n + m, d the new ones' mean less the old mean.

    Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances, eq. 2.1 (1979).
    """
    added = jnp.sum(rows, dtype=jnp.float32)
    count = stats.num_scores + added
    difference = functional.masked_mean(scores, rows) - stats.mean
    squares = added * functional.masked_var(scores, rows, unbiased=False)
    share = added / jnp.maximum(count, 1.0)
    return ScoreStats(
        count,
        stats.mean + difference * share,
        stats.m2 + squares + jnp.square(difference) * stats.num_scores * share,
    )


def scale_scores(
    settings: Settings, stats: ScoreStats | None, scores: jax.Array, rows: jax.Array
) -> tuple[jax.Array, ScoreStats | None, dict[str, jax.Array]]:
    """(scores / deviation, new statistics, metrics); nothing is done without `scale_reward`.

    The deviation is that of the statistics with these scores among them ("running"), or that of the
    first iteration ("ref"), with Bessel's correction, as trlX has it. Where scores do not differ
    they stay what they are.

    Args:
      stats: of the scores of earlier iterations.
      scores: f32[B].
      rows: bool[B], False on rows that only fill up the batch.

    Raises:
      ValueError: there are no statistics, while the settings ask for them.
    """
    if settings.scale_reward is None:
        return scores, stats, {}
    if stats is None:
        raise ValueError("the state holds no score_stats: make it with the same settings.")
    updated = update_score_stats(stats, scores, rows)
    if settings.scale_reward == "ref":
        updated = jax.tree.map(lambda x, y: jnp.where(stats.num_scores > 0, x, y), stats, updated)
    deviation = jnp.sqrt(updated.m2 / jnp.maximum(updated.num_scores - 1.0, 1.0))
    # Equal scores differ from their mean by rounding, which is nothing to divide by.
    scale = jnp.where(deviation > 1e-6 * jnp.abs(updated.mean), deviation, 1.0)
    metrics = {
        "objective/unscaled_scores": functional.masked_mean(scores, rows),
        "objective/score_scale": scale,
    }
    return scores / scale, updated, metrics


def _truncate_token_id(settings: Settings) -> int | None:
    if isinstance(settings.truncate_token, str):
        raise InputError(
            f"ppo.truncate_token is the text {settings.truncate_token!r}, but a step knows no "
            "tokenizer; give it the token's id."
        )
    return settings.truncate_token
