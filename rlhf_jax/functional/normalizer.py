"""The log-normalizer of logits, and the entropy of their softmax."""

import jax.numpy as jnp
from jax import lax

from rlhf_jax.backend import is_on_one_cpu

# Entries of the vocabulary axis that a CPU sums together.
BLOCK = 128
# A logit this far below the largest one has probability 0; finite, because 0 * -inf is NaN.
MIN_LOGPROB = -1e4
_MIN_FLOAT = float(jnp.finfo(jnp.float32).min)


def normalizer(logits):
    """(top, log_total): the largest logit, and log sum_v exp(logit_v - top); f32[...] each.

    Args:
      logits: f32[..., V].

    log_total is NaN, and its gradient undefined, if the largest logit is NaN or infinite.
    """
    top, base, blocks = _blocks(logits)
    parts = jnp.sum(jnp.exp(blocks - base[..., None]), axis=-1)
    total = jnp.sum(parts * jnp.exp(base - top[..., None]), axis=-1)
    return top, jnp.where(jnp.isfinite(top), jnp.log(total), jnp.nan)


def entropy_of(logits):
    """f32[...] of f32[..., V]: sum_v -p_v log p_v in nats; NaN where `normalizer` is NaN.

    With logits in blocks j, their maxima b_j, and w_j = exp(b_j - top):

        H = log Z - sum_j w_j (sum_v e_v (logit_v - b_j) + (b_j - top) sum_v e_v) / Z
    """
    # The barrier keeps log-probabilities of the same logits bit-identical to those without entropy.
    logits = lax.optimization_barrier(logits)
    _, log_total = normalizer(logits)
    top, base, blocks = _blocks(logits)
    parts = jnp.sum(jnp.exp(blocks - base[..., None]), axis=-1)
    # Without the barrier a CPU writes the exponentials of all logits to memory for the two sums.
    blocks, below = lax.optimization_barrier((blocks, base))
    # 0 * -inf is NaN.
    less = jnp.maximum(blocks - below[..., None], MIN_LOGPROB)
    sums = jnp.sum(jnp.exp(less) * less, axis=-1)
    less = jnp.maximum(base - top[..., None], MIN_LOGPROB)
    mean = jnp.sum(jnp.exp(less) * (sums + less * parts), axis=-1) / jnp.exp(log_total)
    return log_total - mean


def _blocks(logits):
    """(top [...], base [..., n], blocks [..., n, V / n]): maximum, maxima of the blocks, blocks.

    On one CPU, sums over a vocabulary in blocks of 128 take a third of the time: intermediate
    values are not written to memory and blocks fit the cache. Other devices use one block.
    """
    size = logits.shape[-1]
    count = max(size // BLOCK, 1) if is_on_one_cpu() and size % BLOCK == 0 else 1
    blocks = logits.reshape(*logits.shape[:-1], count, size // count)
    base = lax.stop_gradient(jnp.max(blocks, axis=-1))
    # Finite, so that a block of -inf sums to 0.
    return jnp.max(base, axis=-1), jnp.maximum(base, _MIN_FLOAT), blocks
