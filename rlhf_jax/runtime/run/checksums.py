"""What the arrays of a tree are, by name: shape, dtype and a checksum, wherever they lie."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError

_MIX = np.uint32(2654435761)


def checksum(array: jax.Array) -> jax.Array:
    """u32[]: a checksum that no single element can change without.

        sum_i (2 i + 1) bits_i   modulo 2^32,   i counting the elements from 0

    The sum is exact in any order, so that it is the same however an array is split over devices;
    odd weights have inverses modulo 2^32, so that a changed element changes its product. An
    element of 64 bits counts as two.
    """
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        size = min(array.dtype.itemsize, 4)
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * size}").astype(jnp.uint32)
    # The index of each element is put together axis by axis: to flatten the array would gather it.
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index, stride = index + place * np.uint32(stride % 2**32), stride * bits.shape[axis]
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """u32[]: one checksum of all arrays of a tree, of which none can change alone without it."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        total = total * _MIX + checksum(leaf)
    return total


@jax.jit
def inspect(tree: Any) -> tuple[jax.Array, jax.Array]:
    """(bool[]: no NaN and no infinity in any array, u32[arrays]: the checksum of each)."""
    leaves = jax.tree.leaves(tree)
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats] or [jnp.array(True)])
    return jnp.all(finite), jnp.stack([checksum(x) for x in leaves])


def described(tree: Any) -> dict[str, list]:
    """[shape, dtype] of each array by its name, as in "params/wte/embedding"."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in found
    }


def check_same(saved: Mapping[str, list], ours: Mapping[str, list], what: str) -> None:
    """Raises an InputError that names the first array in which a checkpoint is another run's.

    Args:
      saved, ours: as from `described`.
      what: names the checkpoint.
    """
    for name in [*ours, *saved]:
        there, here = (_shown(tree.get(name)) for tree in (saved, ours))
        if there != here:
            raise InputError(
                f"{what} is of another model or another version: {name} is {there} there and "
                f"{here} here; put back what the run began with, or choose another --run_dir."
            )


def _shown(found: list | None) -> str:
    return "missing" if found is None else f"{found[1]}{list(found[0])}"
