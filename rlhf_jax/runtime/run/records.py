"""The record that a checkpoint holds beside its arrays: their shapes, dtypes and checksums."""

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlhf_jax.errors import InputError

Record = dict[str, Any]

_NAME = "rlhf_jax"
_MIX = np.uint32(2654435761)
# Errors of the machine or the network: the next attempt may read the files.
_TRANSIENT = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED"
)


def with_checksum(record: Record) -> dict[str, Any]:
    """The record and its checksum, as Orbax's custom metadata."""
    return {_NAME: {"crc32": _crc32(record), "record": record}}


def _crc32(record: Record) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def read_record(folder: epath.Path) -> Record:
    """The record of a checkpoint.

    Raises:
      OSError, ValueError: it is missing or differs from what was written.
    """
    file = folder / "_CHECKPOINT_METADATA"
    try:
        content = json.loads(file.read_text())["custom_metadata"][_NAME]
        record, intact = content["record"], _crc32(content["record"]) == content["crc32"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} is no record") from error
    if not intact:
        raise ValueError(f"{file.name} is not what was saved")
    return record


def newest_record(run_dir: epath.Path) -> Record:
    """The record of the newest checkpoint of a run that can be read; {} without any."""
    folder = run_dir / "checkpoints"
    steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    for step in sorted(steps, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            return read_record(folder / str(step))
    return {}


def short_reason(error: Exception) -> str:
    """An error in a few words: messages of Orbax and TensorStore can be pages long."""
    text = " ".join(str(error).split())
    code = re.match("[A-Z_]{4,}(?=: )", text)
    if code:  # of TensorStore, whose message ends with the name of the array
        name = re.search(r'"([^"]+)/\.zarray"', text)
        return code[0].replace("_", " ").lower() + (f" in {name[1]}" if name else "")
    if isinstance(error, FileNotFoundError):
        return f"{os.path.basename(str(error.filename))} is missing"
    text = re.split(r": \(|\. See ", text)[0][:120]
    return text if type(error) in (ValueError, Exception) else f"{type(error).__name__}: {text}"


def is_transient(error: Exception) -> bool:
    """Whether an error is of the machine rather than of the checkpoint."""
    kinds = (PermissionError, MemoryError, jax.errors.JaxRuntimeError)
    return isinstance(error, kinds) or bool(_TRANSIENT.match(str(error)))


# --- arrays ---------------------------------------------------------------------------------------


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


def digest(values: Iterable[Any]) -> str:
    """The first 16 digits of the SHA-256 of values that JSON holds."""
    total = hashlib.sha256()
    for value in values:
        total.update(json.dumps(value, sort_keys=True, default=repr).encode() + b"\n")
    return total.hexdigest()[:16]


def array_specs(tree: Any) -> dict[str, list]:
    """[shape, dtype] of each array by its path, such as "params/wte/embedding"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
    }


def check_same_arrays(saved: Mapping[str, list], expected: Mapping[str, list], name: str) -> None:
    """Raises an InputError that names the first difference of two `array_specs`.

    Args:
      name: of the checkpoint, for the message.
    """
    for path in [*expected, *saved]:
        there, here = (
            f"{specs[path][1]}{specs[path][0]}" if path in specs else "missing"
            for specs in (saved, expected)
        )
        if there != here:
            raise InputError(
                f"{name} is of another model or another version: {path} is {there} there and "
                f"{here} here; put back what the run began with, or choose another --run_dir."
            )
