"""Parameters gathered to the first host and written as safetensors, one tensor at a time.

With several hosts all of them gather each tensor, in the same order; only the first one writes.
"""

import functools
import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError
from rlhf_jax.models.adapters import plain_params
from rlhf_jax.models.dense import BESIDE_KERNEL, effective_kernel
from rlhf_jax.models.family import SCORE_BIAS, Family, Slot, leaf_at
from rlhf_jax.models.folders import INDEX, WEIGHTS
from rlhf_jax.models.interface import Params
from rlhf_jax.models.stored_types import NUMPY, dtype_in_config
from rlhf_jax.parallel import hosts

MAX_SHARD_BYTES = 5 * 10**9


def config_object(
    family: Family, config: Any, architecture: str, types: Mapping[str, str]
) -> dict[str, Any]:
    """The object in config.json of a model of this architecture, with tensors of these types."""
    data = family.write_config(config, architecture == family.classifier)
    data.pop(SCORE_BIAS, None)  # that of a head read before
    return {
        **data,
        "architectures": [architecture],
        "model_type": family.model_type,
        # The second is read by transformers 4.
        **dict.fromkeys(("dtype", "torch_dtype"), dtype_in_config(types.values())),
    }


def check_params(shapes: Params, params: Params) -> None:
    """Raises a ValueError if parameters are not of these shapes, apart from arrays of adapters."""
    expected, actual = (
        {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree.leaves_with_path, (shapes, plain_params(params)))
    )
    for path in sorted(expected.keys() | actual.keys()):
        if expected.get(path) != actual.get(path):
            raise ValueError(
                f"params{path} must have shape {expected.get(path)}, but has {actual.get(path)}."
            )


def save_model(
    folder: str | pathlib.Path,
    family: Family,
    slots: Mapping[str, Slot],
    own: Mapping[str, Slot],
    params: Params,
    types: Mapping[str, str],
    texts: Mapping[str, Any],
    tokenizer: Any,
) -> None:
    """Writes JSON files, a tokenizer and the weights into a folder; all hosts have to call it.

    Args:
      slots: of the written model.
      own: of the parameters, which may have a smaller vocabulary; zeros follow in the files.
      types: of the tensors in the files, as from `written_types`.
      texts: name of a JSON file -> its object; none is written if that is empty.
      tokenizer: anything with `save_pretrained(folder)`, or None.

    Raises:
      InputError: the folder is not local.
      OSError: it cannot be written.
    """
    shapes = {
        name: jax.ShapeDtypeStruct(slot.shape, NUMPY[types[name]]) for name, slot in slots.items()
    }
    files = _files(shapes)
    order = [own[name] for names in files.values() for name in names]
    tensors = (_gather(_with_adapter(params, slot.path), slot) for slot in order)

    def write(tensors):
        if "://" in str(folder):
            raise InputError(f"Models are saved to local folders, but {folder} is an address.")
        path = pathlib.Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as name:
            temporary = pathlib.Path(name)
            if tokenizer is not None:
                tokenizer.save_pretrained(name)
            for file, data in texts.items():
                if data:
                    write_json(temporary / file, data)
            _write_weights(temporary, family, shapes, files, tensors)
            _publish(temporary, path)

    write_on_first_host(write, tensors)


def _size(shape: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array."""
    return shape.dtype.itemsize * math.prod(shape.shape)


def _files(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, list[str]]:
    """The tensors of each file, in the order written: one file, or some of `MAX_SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    room = MAX_SHARD_BYTES
    for name, shape in shapes.items():
        size = _size(shape)
        if size > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    return {file: sorted(names) for file, names in zip(files, shards, strict=True)}


def _write_weights(folder, family, shapes, files, tensors) -> None:
    """The files, with an index where there are several."""
    if len(files) > 1:
        weight_map = {family.full_name(n): file for file, names in files.items() for n in names}
        total_size = sum(map(_size, shapes.values()))
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    for file, names in files.items():
        named = {family.full_name(name): shapes[name] for name in names}
        write_safetensors(folder / file, named, tensors)


def write_safetensors(
    file: pathlib.Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterator[np.ndarray | None],
) -> None:
    """A file of tensors, each written when it is gathered.

        8 bytes: length of the header, little-endian
        the header: JSON, {name: {"dtype", "shape", "data_offsets"}}, filled up to a multiple of 8
        the tensors, one after another

    Args:
      shapes: of each tensor, with a dtype of `NUMPY`, in the order written.
      tensors: their values; zeros follow one that is smaller than its shape.

    Raises an OSError if the file cannot be written.

    The format of safetensors, https://huggingface.co/docs/safetensors.
    """
    sizes = [_size(shape) for shape in shapes.values()]
    names = {dtype: name for name, dtype in NUMPY.items()}
    stops = np.cumsum(sizes, dtype=np.int64).tolist()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, shape), size, stop in zip(shapes.items(), sizes, stops, strict=True):
        offsets = [stop - size, stop]
        dtype = names[np.dtype(shape.dtype)]
        header[name] = {"dtype": dtype, "shape": list(shape.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for shape, size in zip(shapes.values(), sizes, strict=True):
            tensor = next(tensors)
            assert tensor is not None
            values = np.ascontiguousarray(tensor, shape.dtype)
            target.write(values.view(np.uint8).data)
            target.write(bytes(size - values.nbytes))
            del tensor, values  # before the next one comes


def write_json(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    """An object as JSON, for people to read as well."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_on_first_host(write: Callable[[Iterator[Any]], None], tensors: Iterator[Any]) -> None:
    """write(tensors) on the first host, while the others gather the tensors too.

    If it fails, the remaining tensors are gathered, so that no host waits, and all hosts raise.
    """
    failure = None
    if hosts.is_first():
        try:
            write(tensors)
        except Exception as error:
            failure = error
    for _ in tensors:
        pass
    hosts.from_first(_raise, failure)


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _with_adapter(params, path):
    """The leaf at a path, or a kernel with the arrays beside it, in a dict."""
    *outer, name = path
    module = leaf_at(params, tuple(outer))
    beside = {each: x for each, x in module.items() if each in BESIDE_KERNEL}
    return {name: module[name], **beside} if beside and name == "kernel" else module[name]


def _gather(leaf: Any, slot: Slot) -> np.ndarray | None:
    """The tensor of a slot as in the file, but float32, on the first host; None on the others."""
    first = jax.tree.leaves(leaf)[0]
    if not isinstance(first, jax.Array):
        values = np.asarray(_pick(jax.tree.map(jnp.asarray, leaf), slot.layer))
    elif first.is_fully_addressable:
        values = np.asarray(_picker(None)(leaf, slot.layer))
    else:
        replicated = NamedSharding(first.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
        part = _picker(replicated)(leaf, slot.layer)
        jax.block_until_ready(part)  # on all hosts, so that none has many tensors in flight
        if not hosts.is_first():
            return None
        values = np.asarray(part.addressable_data(0))
    values = values.T if slot.transposed else values
    if values.shape[1:] == slot.shape[1:]:  # without the padding of the vocabulary
        values = values[: slot.shape[0]]
    return np.asarray(values, np.float32).reshape(slot.shape)


@functools.cache
def _picker(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    """The compiled `_pick`; without a sharding the result is on the device of the array."""
    return jax.jit(_pick, out_shardings=sharding)


def _pick(leaf, layer):
    """A layer of a stack, or a copy of the leaf, so that the leaf itself caches no host copy.

    A kernel with an adapter is their float32 sum.
    """
    if layer is None:
        return jnp.copy(leaf)
    parts = jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), leaf
    )
    return effective_kernel(parts) if isinstance(parts, dict) else parts


def _publish(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves files from one folder into the other, and deletes weights of an earlier save.

    Weights come last, their index after them: a save that is cut short leaves the old weights
    complete, or none that can be loaded.
    """
    files = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
    written = {file.name for file in files} - {INDEX}
    for pattern in (INDEX, WEIGHTS, "model-*-of-*.safetensors", "generation_config.json"):
        for path in folder.glob(pattern):
            if path.name not in written:
                path.unlink()
    for file in sorted(files, key=lambda f: (f.name == INDEX, f.suffix == ".safetensors", f)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (temporary / file).replace(folder / file)
