"""The key-value cache of decoding.

Layers with a window keep as many positions as the window has, in a ring: a new one takes the slot
of the one that leaves the window. Keys are stored after their rotation, which says their position.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.parallel.constraints import constrain_cache


class Cache(NamedTuple):
    """Keys and values of past tokens, for all layers.

    Attributes:
      keys, values: dtype[N, B, H, C, d], N layers, H key/value heads, C positions; 0 where nothing
        was written. With `UnstackedLayers`, tuples of N arrays [B, H, C, d].
      mask: bool[B, C], True where a real token was written.
      length: the number of positions written, the same for the full batch (prompts are
        left-padded). A Python 0 says at trace time that the cache is empty.
      sliding_keys, sliding_values: of M layers with a window of W < C positions, which are not
        among those N, with W in the place of C: position p is in slot p % W, until p + W is. None
        where no window is shorter than the cache.
    """

    keys: Any
    values: Any
    mask: jax.Array
    length: jax.Array | int
    sliding_keys: Any = None
    sliding_values: Any = None

    @property
    def memories(self) -> tuple[tuple[Any, Any], ...]:
        """(keys, values) of the layers without a window, and of those with one if they differ."""
        full = (self.keys, self.values)
        sliding = (self.sliding_keys, self.sliding_values)
        return (full,) if self.sliding_keys is None else (full, sliding)

    def updated(self, memories: tuple[Any, ...], mask: jax.Array, length: Any) -> "Cache":
        """A cache with other `memories`, mask and length."""
        (keys, values), (sliding_keys, sliding_values) = (*memories, (None, None))[:2]
        return Cache(keys, values, mask, length, sliding_keys, sliding_values)


def empty_cache(
    shape: tuple[int, int, int, int, int],
    dtype: str,
    is_sliding: tuple[bool, ...] = (),
    window: int | None = None,
) -> Cache:
    """A cache [N, B, H, C, d] to which nothing was written.

    Args:
      is_sliding: of all N layers, if a window is given.
      window: of the sliding layers.
    """
    layers, batch, *heads, length, width = shape
    mask = jnp.zeros((batch, length), bool)
    if window is None or window >= length:
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), mask, 0)
    sliding = (sum(is_sliding), batch, *heads, window, width)
    full = (layers - sum(is_sliding), *shape[1:])
    keys, values, *others = (jnp.zeros(shape, dtype) for shape in (full, full, sliding, sliding))
    return Cache(keys, values, mask, 0, *others)


def repeated(cache: Cache, times: int) -> Cache:
    """A cache of B * times sequences: each of the B is repeated `times` times in succession."""

    def repeat(part):
        axis = part.ndim - 4  # 1 of a stack of layers, 0 of one layer
        part = jnp.repeat(part, times, axis)
        return constrain_cache(part) if axis else part

    memories = jax.tree.map(repeat, cache.memories)
    return cache.updated(memories, jnp.repeat(cache.mask, times, axis=0), cache.length)


def is_empty(cache: Cache) -> bool:
    """Whether it is known at trace time that nothing was written yet."""
    return isinstance(cache.length, int) and cache.length == 0


def fill(
    cache: Cache,
    memory: tuple[Any, Any],
    mask: jax.Array,
    is_sliding: np.ndarray | None,
    window: int | None,
) -> Cache:
    """An empty cache with the keys and values [N, B, H, L, d] of its first L positions.

    Args:
      memory: of all layers.
      is_sliding: bool[N], the layers of which only the last `window` positions are kept.
    """
    length = cache.mask.shape[1]
    written = jnp.pad(mask.astype(bool), ((0, 0), (0, length - mask.shape[1])))
    if cache.sliding_keys is None:
        keys, values = _in_slots(memory, length)
        return Cache(keys, values, written, mask.shape[1])
    (keys, values), (sliding_keys, sliding_values) = (
        _in_slots(tuple(_chosen(part, is_sliding == kind) for part in memory), slots)
        for kind, slots in ((False, length), (True, window))
    )
    return Cache(keys, values, written, mask.shape[1], sliding_keys, sliding_values)


def _chosen(stack, where):
    """The layers of a stack, or a tuple of layers, where a bool[N] is True."""
    if isinstance(stack, tuple):
        return tuple(itertools.compress(stack, where))
    return stack if where.all() else stack[np.flatnonzero(where)]


def _in_slots(memory, slots):
    """Of positions [..., L, d] the last ones, each in the slot of its index modulo `slots`."""

    def place(part):
        length = part.shape[-2]
        if length <= slots:
            part = jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, slots - length), (0, 0)])
        else:
            part = jnp.roll(part[..., length - slots :, :], length % slots, axis=-2)
        return constrain_cache(part) if part.ndim == 5 else part

    return jax.tree.map(place, memory)


def prefix_memory(
    cache: Cache, is_sliding: np.ndarray | None, window: int | None
) -> tuple[Any, Any]:
    """(keys, values) [N, B, H, C, d] of all layers in their order, 0 where a window has passed."""
    if cache.sliding_keys is None:
        return cache.keys, cache.values
    assert is_sliding is not None  # as in `init_cache`
    assert window is not None
    position = jnp.arange(cache.mask.shape[1])
    kept = (position < cache.length) & (position >= cache.length - window)
    order = np.argsort(np.argsort(is_sliding, kind="stable"))

    def merged(full, sliding):
        spread = jnp.take(sliding, position % window, axis=-2)
        return jnp.concatenate([full, jnp.where(kept[:, None], spread, 0)])[order]

    return jax.tree.map(merged, *cache.memories)


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


def visible_in_slots(visible: jax.Array, newest: jax.Array | int, window: int) -> jax.Array:
    """bool[B, 1, W]: whether the position in each slot of a ring is visible to one token.

    Args:
      visible: bool[B, 1, C], by position.
      newest: the position of the token, which is in its slot already.
    """
    position = newest - (newest - jnp.arange(window)) % window
    return jnp.take(visible, jnp.maximum(position, 0), axis=2) & (position >= 0)
