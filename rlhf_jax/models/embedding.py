"""Token embeddings with a padded vocabulary, and the unembedding.

The vocabulary is padded inside to a multiple of 128 (50257 -> 50304), so that its axis divides over
devices and tiles; the padding never leaves `logits`.

A table is {"embedding": [Vp, D]}; in decoding on one CPU {"columns": [D, Vp]}, which a CPU reads
faster where few states are multiplied with all of it.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.backend import is_on_one_cpu
from rlhf_jax.parallel.constraints import all_gather, constrain_batch, constrain_batch_over_data
from rlhf_jax.parallel.partition import Rules

VOCABULARY_MULTIPLE = 128

Table = dict[str, jax.Array]


def padded_vocab_size(vocab_size: int) -> int:
    """`vocab_size` rounded up to a multiple of 128."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def table_for_decoding(table: Table) -> Table:
    """The table in columns on one CPU; elsewhere as it is."""
    return {"columns": table["embedding"].T} if is_on_one_cpu() else table


def is_for_decoding(table: Table) -> bool:
    """Whether `table_for_decoding` transposed this table."""
    return "columns" in table


def check_trainable(table: Table) -> None:
    """Raises a ValueError if the table was transposed for decoding."""
    if is_for_decoding(table):
        raise ValueError("these parameters are laid out by for_decoding; give those of before.")


def lookup(table: Table, ids: jax.Array) -> jax.Array:
    """[..., D]: the vectors of i32[...] ids."""
    if "columns" in table:
        return jnp.moveaxis(jnp.take(table["columns"], ids, axis=1, mode="clip"), 0, -1)
    return jnp.take(table["embedding"], ids, axis=0, mode="clip")


def unembed(
    name: str, table: Table, hidden: jax.Array, dtype: str, rules: Rules, *, decode: bool
) -> jax.Array:
    """f32[..., Vp]: products of [..., D] with all vectors of a table.

    Args:
      name: of the table among the parameters, for the rules.
      decode: whether these are single tokens in decoding, where the table stays split over `fsdp`
        (see `constrain_batch_over_data`).
    """
    if decode:
        hidden = constrain_batch_over_data(hidden, last="fsdp")
    else:
        table = all_gather({name: table}, dtype, rules)[name]
    ((kind, array),) = table.items()
    axes = "...d,dv->...v" if kind == "columns" else "...d,vd->...v"
    array = array.astype(hidden.dtype)
    logits = jnp.einsum(axes, hidden, array, preferred_element_type=jnp.float32)
    logits = constrain_batch_over_data(logits, last="tensor") if decode else logits
    return constrain_batch(logits, last="tensor")


def mask_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits f32[..., Vp] with -inf from `vocab_size` on."""
    is_token = jnp.arange(logits.shape[-1]) < vocab_size
    # Added and not selected: the sum becomes part of the product.
    return logits + jnp.where(is_token, 0.0, -jnp.inf)
