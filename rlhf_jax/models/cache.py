"""The key-value cache of decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.parallel.constraints import constrain_cache


class Cache(NamedTuple):
    """Keys and values of past tokens, for all layers.

    Attributes:
      keys, values: dtype[N, B, H, C, d], N layers, H key/value heads, C positions; 0 where nothing
        was written. With `UnstackedLayers`, tuples of N arrays [B, H, C, d].
      mask: bool[B, C], True where a real token was written.
      length: the number of positions written, the same for the full batch (prompts are
        left-padded). A Python 0 says at trace time that the cache is empty.
    """

    keys: Any
    values: Any
    mask: jax.Array
    length: jax.Array | int


def empty_cache(shape: tuple[int, int, int, int, int], dtype: str) -> Cache:
    """A cache [N, B, H, C, d] to which nothing was written."""
    _, batch, _, length, _ = shape
    keys = jnp.zeros(shape, dtype)
    return Cache(keys, jnp.zeros_like(keys), jnp.zeros((batch, length), bool), 0)


def is_empty(cache: Cache) -> bool:
    """Whether it is known at trace time that nothing was written yet."""
    return isinstance(cache.length, int) and cache.length == 0


def fill(cache: Cache, memory: tuple[Any, Any], mask: jax.Array) -> Cache:
    """An empty cache with the keys and values [N, B, H, L, d] of its first L positions."""
    missing = (0, cache.mask.shape[1] - mask.shape[1])
    keys, values = jax.tree.map(
        lambda part: jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [missing, (0, 0)]), memory
    )
    if not isinstance(keys, tuple):
        keys, values = constrain_cache(keys), constrain_cache(values)
    written = jnp.pad(mask.astype(bool), ((0, 0), missing))
    return Cache(keys, values, written, mask.shape[1])


def visible_in_cache(cache: Cache, new: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(bool[B, L, C], bool[B, C]): the positions of the cache that L new tokens see, and its mask.

    Args:
      new: bool[B, L, L], which of the new tokens each one sees.
      mask: [B, L] of the new tokens, nonzero on real ones.
    """
    shape = (*mask.shape, cache.mask.shape[1])
    written = jnp.arange(shape[2]) < cache.length
    before = jnp.broadcast_to((cache.mask & written)[:, None], shape)
    visible = jax.lax.dynamic_update_slice(before, new, (0, 0, cache.length))
    new_mask = jax.lax.dynamic_update_slice(cache.mask, mask.astype(bool), (0, cache.length))
    return visible, new_mask
