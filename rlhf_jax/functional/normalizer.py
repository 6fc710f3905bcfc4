"""What makes probabilities of logits: the normalizer of each row, and its entropy."""

import jax.numpy as jnp
from jax import lax

from rlhf_jax.backend import is_on_one_cpu

# Entries of a row that a CPU sums together.
BLOCK = 128
# A logit this far below the largest has probability 0, times whatever a gradient is.
NOTHING = -1e4
_LEAST = float(jnp.finfo(jnp.float32).min)


def normalizer(logits):
    """(top, log_total): the largest logit, and log sum_v exp(logit_v - top); f32[...] each.

    Args:
      logits: f32[..., V].

    log_total is NaN, of a gradient that means nothing, where there is no sum: where the largest
    logit is NaN or infinite.
    """
    top, base, blocks = _blocks(logits)
    parts = jnp.sum(jnp.exp(blocks - base[..., None]), axis=-1)
    total = jnp.sum(parts * jnp.exp(base - top[..., None]), axis=-1)
    return top, jnp.where(jnp.isfinite(top), jnp.log(total), jnp.nan)


def entropy_of(logits):
    """f32[...] of f32[..., V]: sum_v -p_v log p_v in nats; NaN as `normalizer` has it.

    With logits in blocks j of largest logits b_j, and w_j = exp(b_j - top):

        H = log Z - sum_j w_j (sum_v e_v (logit_v - b_j) + (b_j - top) sum_v e_v) / Z
    """
    # By itself: log-probabilities of the same logits are then, to the bit, what they are alone.
    logits = lax.optimization_barrier(logits)
    _, log_total = normalizer(logits)
    top, base, blocks = _blocks(logits)
    parts = jnp.sum(jnp.exp(blocks - base[..., None]), axis=-1)
    # By themselves: a CPU would write the exponentials of all logits, for two sums to read.
    blocks, below = lax.optimization_barrier((blocks, base))
    # 0 * -inf is NaN.
    less = jnp.maximum(blocks - below[..., None], NOTHING)
    sums = jnp.sum(jnp.exp(less) * less, axis=-1)
    less = jnp.maximum(base - top[..., None], NOTHING)
    mean = jnp.sum(jnp.exp(less) * (sums + less * parts), axis=-1) / jnp.exp(log_total)
    return log_total - mean


def _blocks(logits):
    """(top [...], base [..., n], blocks [..., n, V / n]): the largest of all, and of each block.

    Where a CPU sums rows of a vocabulary, blocks of 128 take a third of the time: it neither writes
    what it sums nor walks through a row that no cache holds. Elsewhere there is one.
    """
    size = logits.shape[-1]
    count = max(size // BLOCK, 1) if is_on_one_cpu() and size % BLOCK == 0 else 1
    blocks = logits.reshape(*logits.shape[:-1], count, size // count)
    base = lax.stop_gradient(jnp.max(blocks, axis=-1))
    # Finite, so that a block of -inf gives 0.
    return jnp.max(base, axis=-1), jnp.maximum(base, _LEAST), blocks
