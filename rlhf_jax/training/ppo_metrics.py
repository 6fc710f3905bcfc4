"""What PPO reports of the responses that an iteration sampled."""

import jax
import jax.numpy as jnp

from rlhf_jax import functional
from rlhf_jax.batches import ScoredRollout


def objective_metrics(
    kl_coef: jax.Array,
    scored: ScoredRollout,
    rewards: jax.Array,
    entropy: jax.Array,
    exact_kl: jax.Array | None,
) -> dict[str, jax.Array]:
    """What the iteration sampled: means over responses of scores and of sums over tokens.

    Rows without a token only fill up a short last batch, and count nowhere.

    Args:
      kl_coef: f32[], with which the rewards were made.
      rewards: f32[B, T] of the tokens, 0 off the mask.
      entropy: f32[B, T] of the distributions that the tokens were sampled from.
      exact_kl: f32[B, T] of those distributions to the reference's, where it was asked for.
    """
    mask, scores = scored.mask, scored.scores
    rows = mask.any(axis=1)
    score_mean = functional.masked_mean(scores, rows)
    # token_rewards puts the score on the last real token; what remains is the penalty.
    total = functional.masked_mean(jnp.sum(rewards, axis=1), rows)
    differences = jnp.sum(scored.logprobs - scored.ref_logprobs, axis=1)
    tokens = jnp.sum(mask, dtype=jnp.float32)
    exact = {}
    if exact_kl is not None:
        sums = jnp.sum(jnp.where(mask, exact_kl, 0.0), axis=1)
        exact["objective/kl_exact"] = functional.masked_mean(sums, rows)
    return {
        "objective/scores": score_mean,
        "objective/scores_std": jnp.sqrt(functional.masked_var(scores, rows, unbiased=False)),
        "objective/kl": functional.masked_mean(differences, rows),
        "objective/rlhf_reward": total,
        "objective/non_score_reward": total - score_mean,
        "objective/entropy": functional.masked_mean(jnp.sum(-scored.logprobs, axis=1), rows),
        "objective/kl_coef": kl_coef,
        "objective/response_length": functional.masked_mean(
            jnp.sum(mask, axis=1, dtype=jnp.float32), rows
        ),
        "policy/entropy_avg": functional.masked_mean(entropy, mask),
        "perf/tokens": tokens + jnp.sum(scored.prompt_mask, dtype=jnp.float32),
        **exact,
    }
