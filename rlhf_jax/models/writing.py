"""Parameters gathered to the first host and written as safetensors, one tensor at a time.

With several hosts all of them take part in gathering each tensor, in the same order; only the first
one writes.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.models.family import Family, Slot, leaf_at
from rlhf_jax.models.interface import Params
from rlhf_jax.models.reading import INDEX, WEIGHTS

MAX_SHARD_BYTES = 5 * 10**9


def check_params(shapes: Params, params: Params) -> None:
    """Raises a ValueError if parameters are not of these shapes."""
    expected, actual = _shapes_by_path(shapes), _shapes_by_path(params)
    for path in sorted(expected.keys() | actual.keys()):
        if expected.get(path) != actual.get(path):
            raise ValueError(
                f"params{path} must have shape {expected.get(path)}, but has {actual.get(path)}."
            )


def _shapes_by_path(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}


def files_of(slots: Mapping[str, Slot]) -> dict[str, list[str]]:
    """The tensors of each file, in the order written: one file, or some of `MAX_SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    room = MAX_SHARD_BYTES
    for name, slot in slots.items():
        size = 4 * math.prod(slot.shape)
        if size > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    return {file: sorted(names) for file, names in zip(files, shards, strict=True)}


def gathered_tensors(
    tree: Params, slots: Mapping[str, Slot], names: Sequence[str]
) -> Iterator[np.ndarray | None]:
    """Each of these tensors in turn, in full and float32, on the first host; None on the others."""
    for name in names:
        slot = slots[name]
        yield _as_stored(_gather(leaf_at(tree, slot.path), slot.layer), slot)


def _as_stored(values: np.ndarray | None, slot: Slot) -> np.ndarray | None:
    """float32 of the shape in the file, without the padding of the vocabulary."""
    if values is None:
        return None
    values = values.T if slot.transposed else values
    if values.shape[1:] == slot.shape[1:]:
        values = values[: slot.shape[0]]
    return np.asarray(values, np.float32).reshape(slot.shape)


def write_weights(
    folder: pathlib.Path,
    family: Family,
    slots: Mapping[str, Slot],
    files: Mapping[str, Sequence[str]],
    tensors: Iterator[np.ndarray | None],
) -> None:
    """The files of `files_of`, with an index where there are several.

    Args:
      slots: of the written model; where its vocabulary is larger, zeros follow.
      tensors: of `gathered_tensors`.

    Raises:
      OSError: the files cannot be written.
    """
    if len(files) > 1:
        weight_map = {
            family.full_name(name): file for file, names in files.items() for name in names
        }
        total_size = sum(4 * math.prod(slot.shape) for slot in slots.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    for file, names in files.items():
        shapes = {family.full_name(name): slots[name].shape for name in names}
        write_safetensors(folder / file, shapes, tensors)


def write_safetensors(
    file: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[np.ndarray | None],
) -> None:
    """A file of float32 tensors, each written as it comes.

        8 bytes: length of the header, little-endian
        the header: JSON, {name: {"dtype", "shape", "data_offsets"}}, filled up to a multiple of 8
        the tensors, one after another

    Args:
      shapes: of each tensor, in the order written.
      tensors: their values; zeros follow one that is smaller than its shape.

    Raises:
      OSError: the file cannot be written.

    The format of safetensors, https://huggingface.co/docs/safetensors.
    """
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True):
        offsets = [end - size, end]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for size in sizes:
            tensor = next(tensors)
            assert tensor is not None
            values = np.ascontiguousarray(tensor, "<f4")
            target.write(values.data)
            target.write(bytes(size - values.nbytes))
            del tensor, values  # before the next one comes


def write_json(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    """An object as JSON, for people to read as well."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_on_first_host(
    write: Callable[[Iterator[Any]], None], tensors: Iterator[Any], what: str
) -> None:
    """write(tensors) on the first host, while the others take part in gathering the tensors.

    If it fails, the remaining tensors are gathered, so that no host waits, and all hosts raise.

    Raises:
      OSError: on the other hosts, where the first one failed.
    """
    if jax.process_count() == 1:
        write(tensors)
        return
    failure = None
    if jax.process_index() == 0:
        try:
            write(tensors)
        except Exception as error:
            failure = error
    for _ in tensors:
        pass
    has_failed = multihost_utils.broadcast_one_to_all(np.int32(failure is not None))
    if failure is not None:
        raise failure
    if has_failed:
        raise OSError(f"the first host could not write {what}; its own message says why.")


def _gather(leaf: Any, layer: int | None) -> np.ndarray | None:
    """A layer of a leaf, or all of it, on the first host; None on the others."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf if layer is None else leaf[layer])
    replicated = None
    if not leaf.is_fully_addressable:
        replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
    part = _picker(replicated)(leaf, layer is not None, layer or 0)
    if replicated is None:
        return np.asarray(part)
    # All hosts wait, so that none has many tensors in flight.
    jax.block_until_ready(part)
    return np.asarray(part.addressable_data(0)) if jax.process_index() == 0 else None


@functools.cache
def _picker(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    """The compiled `_pick`; without a sharding the result is on the device of the array."""
    return jax.jit(_pick, static_argnums=1, out_shardings=sharding)


def _pick(leaf, is_stack, layer):
    """A layer of a stack, or a copy of the leaf, so that the leaf itself caches no host copy."""
    if is_stack:
        return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return jnp.copy(leaf)
