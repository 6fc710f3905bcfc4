"""From a score as it was given to the one that PPO is to raise."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.batches import Rollout
from rlhf_jax.training.ppo_settings import Settings


def shape_scores(
    settings: Settings, stop_token_ids: Sequence[int], rollout: Rollout, scores: jax.Array
) -> jax.Array:
    """f32[B]: scores after the penalty for a missing EOS, and clipping."""
    scores = scores.astype(jnp.float32)
    if settings.missing_eos_penalty is not None:
        stopped = jnp.zeros(rollout.mask.shape, bool)
        for stop in stop_token_ids:
            stopped |= rollout.mask & (rollout.tokens == stop)
        penalty = jnp.where(stopped.any(axis=1), 0.0, settings.missing_eos_penalty)
        scores = scores - penalty
    if settings.cliprange_reward is not None:
        scores = jnp.clip(scores, -settings.cliprange_reward, settings.cliprange_reward)
    return scores
