"""Shapes, dtypes and checksums of the arrays of a pytree, whatever their sharding."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError

_MIX = np.uint32(2654435761)


def checksum(array: jax.Array) -> jax.Array:
    """u32[]: a checksum that changes with any single element.

        sum_i (2 i + 1) bits_i   modulo 2^32,   i counting the elements from 0

    The sum is exact in any order, and so independent of the sharding; odd weights have inverses
    modulo 2^32, so that a changed element changes its product. An element of 64 bits counts as two.
    """
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        size = min(array.dtype.itemsize, 4)
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * size}").astype(jnp.uint32)
    # The index of each element is a sum over axes: flattening would gather the array.
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index, stride = index + position * np.uint32(stride % 2**32), stride * bits.shape[axis]
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """u32[]: one checksum of all arrays of a pytree; it changes with any single array."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        total = total * _MIX + checksum(leaf)
    return total


@jax.jit
def inspect(tree: Any) -> tuple[jax.Array, jax.Array]:
    """(bool[]: whether all arrays are finite, u32[N]: the checksum of each of the N arrays)."""
    leaves = jax.tree.leaves(tree)
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats] or [jnp.array(True)])
    return jnp.all(finite), jnp.stack([checksum(x) for x in leaves])


def array_specs(tree: Any) -> dict[str, list]:
    """[shape, dtype] of each array by its path, such as "params/wte/embedding"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
    }


def check_same_arrays(saved: Mapping[str, list], expected: Mapping[str, list], name: str) -> None:
    """Raises an InputError that names the first array in which a checkpoint is another run's.

    Args:
      saved, expected: as from `array_specs`.
      name: of the checkpoint, for the message.
    """
    for path in [*expected, *saved]:
        there, here = (_spec_text(specs.get(path)) for specs in (saved, expected))
        if there != here:
            raise InputError(
                f"{name} is of another model or another version: {path} is {there} there and "
                f"{here} here; put back what the run began with, or choose another --run_dir."
            )


def _spec_text(spec: list | None) -> str:
    return "missing" if spec is None else f"{spec[1]}{list(spec[0])}"
