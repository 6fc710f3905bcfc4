"""Dropout from a hash of an entry's index, so cheap that nothing of it is kept.

    x_i -> x_i / (1 - rate) where hash(key, i) >= rate * 2^32, and 0 elsewhere

The backward pass hashes again: a hash is some twenty integer operations that XLA fuses with the
reader of the entry, whereas random numbers of JAX are written to memory first.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_WORDS = 2**32


class Dropout(NamedTuple):
    """Which entries are dropped.

    Attributes:
      words: u32[2], random, the same for all entries.
      dropped: u32[]; an entry whose hash is below is dropped.
      scale: f32[], the factor of the others, which keeps expectations.
    """

    words: jax.Array
    dropped: jax.Array
    scale: jax.Array


def start_dropout(key: jax.Array, rate: float) -> Dropout:
    """Dropout of entries with probability `rate`, from 0 to below 1, to the nearest 2^-32.

    Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting.
    """
    dropped = min(round(rate * _WORDS), _WORDS - 1)
    words = jax.random.bits(key, (2,), jnp.uint32)
    scale = jnp.asarray(_WORDS / (_WORDS - dropped), jnp.float32)
    return Dropout(words, jnp.asarray(dropped, jnp.uint32), scale)


def traced_dropout(key: jax.Array, rate: jax.Array) -> Dropout:
    """`start_dropout` at a rate f32[], from 0 to below 1, to the nearest 2^-24."""
    dropped = jnp.round(rate * 2.0**24)
    words = jax.random.bits(key, (2,), jnp.uint32)
    return Dropout(words, dropped.astype(jnp.uint32) << 8, 2.0**24 / (2.0**24 - dropped))


def kept(dropout: Dropout, shape: tuple[int, ...], first_row: int = 0) -> jax.Array:
    """bool[shape], True where an entry is kept; of shape [..., rows, columns], each below 65,536.

    An entry depends on its indices alone: rows from `first_row` on are dropped as in the full
    array, on any number of devices.
    """
    *outer, _, _ = shape
    number = jnp.zeros((*outer, 1, 1), jnp.uint32)
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32)
    for axis, size in enumerate(outer):
        number = number * jnp.uint32(size) + iota(number.shape, axis)
    # Two words for each matrix, and one for each of its entries.
    first = _hash(number ^ dropout.words[0])
    second = _hash(first + dropout.words[1])
    row = iota(shape, len(shape) - 2) + jnp.uint32(first_row)
    entry = (row << 16) ^ iota(shape, len(shape) - 1)
    return _hash(_hash(entry ^ first) + second) >= dropout.dropped


def drop(dropout: Dropout, x: jax.Array) -> jax.Array:
    """The array after dropout, in its dtype."""
    # Rounded to bfloat16 the scale would be off by up to 0.2 %.
    return jnp.where(kept(dropout, x.shape), (x * dropout.scale).astype(x.dtype), 0)


def _hash(x):
    """u32 of u32: one to one, and each bit of it depends on all.

    The shifts and factors were found by a search for little bias: Wellons, Prospecting for Hash
    Functions, 2018 (nullprogram.com/blog/2018/07/31), "lowbias32".
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
