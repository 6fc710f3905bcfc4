"""Parameters read from safetensors files in parts, for each device its own part.

The memory of a host holds at most the part of one leaf that one of its devices will hold, and of a
large stack of layers at most some layers, at a time.
"""

import contextlib
import functools
import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from rlhf_jax.errors import InputError
from rlhf_jax.models.adapters import merged_trees, nested
from rlhf_jax.models.family import SCORE, SCORE_BIAS, Family, Slot
from rlhf_jax.models.folders import read_json, weight_files
from rlhf_jax.models.interface import ModelConfig, Params
from rlhf_jax.models.stored_types import NUMPY

PART_BYTES = 2**28  # of a leaf read at a time, or one index of axis 0 if that is more

_FLOATS = ("F64", "F32", "F16", "BF16")

Index = tuple[slice, ...]
# (path, array) -> {name: array}, which takes its place in its module
Convert = Callable[[tuple[str, ...], jax.Array], Params]


class TensorFile(NamedTuple):
    """A tensor of an open file: `safe_open(...).get_slice`, with reversed axes if transposed."""

    file: pathlib.Path
    name: str
    data: Any
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is read."""
        shape = tuple(self.data.get_shape())
        return shape[::-1] if self.transposed else shape

    def read(self, index: Index) -> np.ndarray:
        """float32 of the part at these slices; no other part of the file is read."""
        try:
            values = np.asarray(self.data[index[::-1] if self.transposed else index])
        except SafetensorError as error:
            raise unreadable(self.file, error) from error
        with np.errstate(over="ignore"):  # of float64
            values = values.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise InputError(
                f"{self.file}: the tensor {self.name!r} holds values that are not finite in "
                "float32; train or download the model again."
            )
        return values.T if self.transposed else values


def read_params(
    folder: pathlib.Path,
    family: Family,
    slots: dict[str, Slot],
    shapes: Params,
    shardings: Params | None,
    label: int | None,
    convert: Convert | None = None,
) -> Params:
    """The tensors of a folder as float32 arrays; all are checked before one is read.

    Args:
      slots: the tensors that the folder has to hold.
      shapes: of the parameters.
      shardings: of the parameters; None for the default device.
      label: the one to read of a head with several labels.
      convert: of each array of the language model, as soon as it is read.

    Raises:
      InputError: a tensor is missing, unknown, twice there, or of a wrong shape or type.
    """
    with contextlib.ExitStack() as files:
        tensors = find_tensors(folder, family, slots, label, files)
        by_path: dict[tuple[str, ...], list[str]] = {}
        for name, slot in slots.items():
            by_path.setdefault(slot.path, []).append(name)  # the layers of a stack in their order
        leaves = jax.tree.leaves_with_path(shapes)
        places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
        tree: Params = {}
        for (keys, leaf), place in zip(leaves, places, strict=True):
            path = tuple(key.key for key in keys)
            names = by_path[path]
            stacked = slots[names[0]].layer is not None
            parts = [tensors[name] for name in names]
            read = functools.partial(_read_part, parts, stacked, label or 0, leaf.shape[-1])
            array = make_array(leaf.shape, place, read)
            module = {path[-1]: array}
            if convert is not None:
                module = convert(path[1:], array)  # without "model"
            tree = merged_trees(tree, nested(path[:-1], module))
    return tree


def make_array(
    shape: tuple[int, ...], sharding: Sharding | None, read: Callable[[Index], np.ndarray]
) -> jax.Array:
    """A float32 array, on the default device without a sharding.

    Each process reads the parts that its devices hold. Where axis 0 is not split, `PART_BYTES` are
    read at a time, or one index if that is more.

    Args:
      read: the values at slices with a start and a stop for each axis.
    """
    local = shape if sharding is None else sharding.shard_shape(shape)
    count = max(1, PART_BYTES // (4 * math.prod(local[1:])))
    if count >= shape[0] or local[0] < shape[0]:
        return jax.block_until_ready(_placed(shape, sharding, read))
    array = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, jnp.float32)
    update = jax.jit(
        functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0),
        donate_argnums=0,
        out_shardings=sharding,
    )
    for start in range(0, shape[0], count):
        part_shape = (min(count, shape[0] - start), *shape[1:])
        part = _placed(part_shape, sharding, functools.partial(_read_behind, read, start))
        array = jax.block_until_ready(update(array, part, start))
    return array


def _placed(shape, sharding, read):
    """The full array at once; a part that several devices hold is read once for all of them."""
    if sharding is None:
        # A copy, because JAX on a CPU would otherwise keep NumPy's memory and could not donate it.
        return jnp.array(read(tuple(slice(0, size) for size in shape)))
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        part = read(tuple(slice(*bound) for bound in bounds))
        arrays += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_behind(read, start, index):
    """read(index) with `start` added to the slice of axis 0."""
    first, *rest = index
    return read((slice(start + first.start, start + first.stop), *rest))


def _read_part(
    tensors: list[TensorFile], stacked: bool, label: int, width: int, index: Index
) -> np.ndarray:
    """The part of a leaf at these slices; if it is stacked, each layer is a tensor."""
    if not stacked:
        return _read_one(tensors[0], label, width, index)
    layers, *rest = index
    part = np.empty([each.stop - each.start for each in index], np.float32)
    for place, tensor in enumerate(tensors[layers]):
        part[place] = _read_one(tensor, label, width, tuple(rest))
    return part


def _read_one(tensor: TensorFile, label: int, width: int, index: Index) -> np.ndarray:
    """The same of one tensor, whose shape in the file may differ (see `Slot`)."""
    shape = tensor.shape
    if len(index) < len(shape):
        return tensor.read((slice(label, label + 1), *index))[0]
    if len(index) > len(shape):
        *before, outer, inner = index
        starts = [width * i for i in range(outer.start, outer.stop)]
        parts = [
            tensor.read((*before, slice(start + inner.start, start + inner.stop)))
            for start in starts
        ]
        return np.stack(parts, axis=-2)
    first, *rest = index
    if first.stop <= shape[0]:
        return tensor.read(index)
    part = np.zeros([each.stop - each.start for each in index], np.float32)
    if first.start < shape[0]:  # the padding of the vocabulary is not in the file
        part[: shape[0] - first.start] = tensor.read((slice(first.start, shape[0]), *rest))
    return part


def check_sizes(folder: pathlib.Path, family: Family, config: ModelConfig) -> dict[str, str]:
    """The type of each tensor of a folder, by its name without the prefix: F32, F16 or BF16.

    A layer has a tensor at least. `find_tensors` compares exactly, but only after it has listed the
    tensors of all layers.

    Raises:
      InputError: the sizes are far beyond the tensors.
    """
    types: dict[str, str] = {}
    count, largest = 0, 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                tensors = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                shapes = [tensor.get_shape() for tensor in tensors.values()]
                for name, tensor in tensors.items():
                    kind = tensor.get_dtype()
                    types[name.removeprefix(family.prefix)] = kind if kind in NUMPY else "F32"
        except SafetensorError as error:
            raise unreadable(file, error) from error
        count += len(shapes)
        largest = max([largest, *itertools.chain(*shapes)])
    for name, limit, kind in (
        ("n_layer", count, "number of tensors"),
        ("n_embd", largest, "longest axis of a tensor"),
        ("vocab_size", largest, "longest axis of a tensor"),
    ):
        if (size := getattr(config, name)) > limit:
            raise InputError(
                f"{folder}: config.json has {name} {size}, but the {kind} in the weights is "
                f"{limit}; save or download the model again."
            )
    return types


def read_score_bias(folder: pathlib.Path) -> jax.Array | None:
    """The bias of a reward head, f32[], from the config.json of a folder; None without one."""
    value = read_json(folder / "config.json").get(SCORE_BIAS)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(
            f"{folder / 'config.json'}: {SCORE_BIAS} must be a finite number, but is {value!r}."
        )
    return jnp.float32(value)


def find_tensors(
    folder: pathlib.Path,
    family: Family,
    slots: dict[str, Slot],
    label: int | None,
    files: contextlib.ExitStack,
) -> dict[str, TensorFile]:
    """Each tensor by its name without the prefix; names, shapes and types are checked.

    Args:
      files: closes the files.

    Raises:
      InputError: as `read_params`.
    """
    tensors: dict[str, TensorFile] = {}
    for file in weight_files(folder):
        try:
            opened = files.enter_context(safe_open(file, framework="numpy"))
            for name in opened.keys():  # noqa: SIM118, the file is no mapping
                short = name.removeprefix(family.prefix)
                if short.endswith(family.ignored):
                    continue
                if short in tensors:
                    raise InputError(f"{folder} holds the tensor {short!r} twice; save it again.")
                slot = slots.get(short, slots.get(family.tied.get(short, short)))
                data = opened.get_slice(name)
                _check_fits(family, f"{file}: the tensor {name!r}", short, data, slot, label)
                is_transposed = slot is not None and slot.transposed
                tensors[short] = TensorFile(file, name, data, is_transposed)
        except SafetensorError as error:
            raise unreadable(file, error) from error
    missing = slots.keys() - tensors.keys()
    if SCORE in missing:
        raise InputError(
            f"{folder} has no tensor {SCORE!r}, so it is no reward model; "
            "train one, or load it as a language model."
        )
    if missing:
        raise InputError(
            f"{folder} lacks the tensor {min(missing)!r} ({len(missing)} missing in all) of the "
            "model that its config.json describes; save or download it again."
        )
    for name, other in family.tied.items():
        tied = None if name in slots else tensors.pop(name, None)
        if tied is not None and not _are_equal(tied, tensors[other]):
            raise InputError(
                f"{folder}: the tensor {name!r} differs from {other!r}, "
                "but only tied embeddings are supported; choose another model."
            )
    return tensors


def _are_equal(one: TensorFile, other: TensorFile) -> bool:
    """Whether two matrices of one shape are the same; parts of both are read at a time."""
    length, width = one.shape
    count = max(1, PART_BYTES // (4 * width))
    parts = [(slice(start, min(start + count, length)),) for start in range(0, length, count)]
    return all(np.array_equal(one.read(part), other.read(part)) for part in parts)


def unreadable(file: pathlib.Path, error: Exception) -> InputError:
    """The error of a safetensors file that cannot be read."""
    return InputError(f"{file} cannot be read ({error}); save or download it again.")


def _check_fits(family, tensor, name, data, slot, label) -> None:
    shape, dtype = list(data.get_shape()), data.get_dtype()
    if slot is None and name == SCORE:
        raise InputError(f"{tensor} is the head of a reward model: load it with load_reward_model.")
    if slot is None:
        raise InputError(
            f"{tensor} {shape} is no part of the {family.name} that config.json describes; check "
            "its number of layers, or choose another model."
        )
    expected = list(slot.shape)
    if name == SCORE and label is not None:
        if label >= (shape or [0])[0]:
            raise InputError(
                f"{tensor} has shape {shape}, so there is no label {label}; the first one is 0."
            )
        shape[0] = 1
    if name == SCORE and shape[:1] != [1]:
        raise InputError(
            f"{tensor} has shape {shape}, but a reward model has one label, {expected}; of a "
            "classifier choose the label that is the score (`label` of a source in `rewards`)."
        )
    if shape != expected:
        raise InputError(f"{tensor} has shape {shape}, but config.json needs {expected}.")
    check_float(tensor, dtype)


def check_float(tensor: str, dtype: str) -> None:
    """Raises an InputError if the type of a tensor is none of floating-point numbers."""
    if dtype not in _FLOATS:
        raise InputError(
            f"{tensor} is stored as {dtype}, but only {', '.join(_FLOATS)} can be read; save the "
            "model unquantized."
        )
