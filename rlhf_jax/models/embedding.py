"""Token embeddings with a padded vocabulary, and the unembedding.

The vocabulary is padded inside to a multiple of 128 (50257 -> 50304), so that its axis divides over
devices and tiles; the padding never leaves `logits`.

A table is {"embedding": [Vp, D]}.
"""

import math

import jax
import jax.numpy as jnp

from rlhf_jax.backend import is_on_one_cpu
from rlhf_jax.parallel.constraints import all_gather, constrain_batch, constrain_batch_over_data
from rlhf_jax.parallel.partition import Rules

VOCABULARY_MULTIPLE = 128
# In float32, table @ states is faster on a CPU than states @ table.T for up to this many states.
FEW_STATES = 32

Table = dict[str, jax.Array]


def padded_vocab_size(vocab_size: int) -> int:
    """`vocab_size` rounded up to a multiple of 128."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def lookup(table: Table, ids: jax.Array) -> jax.Array:
    """[..., D]: the vectors of i32[...] ids."""
    return jnp.take(table["embedding"], ids, axis=0, mode="clip")


def unembed(
    name: str, table: Table, hidden: jax.Array, dtype: str, rules: Rules, *, decode: bool
) -> jax.Array:
    """f32[..., Vp]: products of [..., D] with all vectors of a table.

    Args:
      name: of the table among the parameters, for the rules.
      decode: whether these are single tokens in decoding, where the table stays split over `fsdp`
        (see `constrain_batch_over_data`), and where one CPU multiplies it with few states in the
        faster order.
    """
    if decode:
        hidden = constrain_batch_over_data(hidden, last="fsdp")
    else:
        table = all_gather({name: table}, dtype, rules)[name]
    vectors = table["embedding"].astype(hidden.dtype)
    is_few = hidden.dtype == jnp.float32 and math.prod(hidden.shape[:-1]) <= FEW_STATES
    if decode and is_few and is_on_one_cpu():
        logits = _product("vd,...d->v...", vectors, hidden)
        # Without the barrier XLA makes the transposition of this product the other product.
        logits = jnp.moveaxis(jax.lax.optimization_barrier(logits), 0, -1)
    else:
        logits = _product("...d,vd->...v", hidden, vectors)
    logits = constrain_batch_over_data(logits, last="tensor") if decode else logits
    return constrain_batch(logits, last="tensor")


def _product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def mask_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits f32[..., Vp] with -inf from `vocab_size` on."""
    is_token = jnp.arange(logits.shape[-1]) < vocab_size
    # Added and not selected: the sum becomes part of the product.
    return logits + jnp.where(is_token, 0.0, -jnp.inf)
