"""Adapters read from and written to PEFT's `adapter_model.safetensors`.

An adapter is small beside its base: each host reads all of it.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from rlhf_jax.errors import InputError
from rlhf_jax.models.adapters import Adapters, merged_trees, nested
from rlhf_jax.models.dense import column_norms
from rlhf_jax.models.family import SCORE, Slot, leaf_at
from rlhf_jax.models.interface import Params
from rlhf_jax.models.peft_config import (
    CONFIG,
    kernel_modules,
    read_adapter_config,
    resolve_adapters,
    written_config,
)
from rlhf_jax.models.reading import TensorFile, check_float, unreadable
from rlhf_jax.models.writing import write_json, write_safetensors
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.partition import tree_shardings

WEIGHTS = "adapter_model.safetensors"

logger = logging.getLogger("rlhf_jax.models")

_PREFIX = "base_model.model."


def read_adapter(
    folder: str | pathlib.Path,
    base: str | pathlib.Path,
    model: Any,
    slots: Mapping[str, Slot],
    params: Params,
    mesh: Mesh | None = None,
) -> tuple[Any, Params]:
    """(model, params) with the adapters of a folder, and its modules in full in the base's place.

    A warning is logged where the configuration names another base.

    Args:
      base: the folder or hub name of the base.
      slots: every tensor of the model, by its full name.
      params: of the base.
      mesh: of the parameters; None for the default device.

    Raises:
      InputError: the folder cannot be read, its configuration is not supported, or it is of another
        base.
    """
    folder = pathlib.Path(folder).expanduser()
    config = read_adapter_config(folder)
    _warn_of_base(folder, config.get("base_model_name_or_path"), base)
    adapters = resolve_adapters(config, model, slots, str(folder / CONFIG))
    tensors = _read_tensors(folder / WEIGHTS)
    tree: Params = {}
    for target in adapters.targets:
        kernel = leaf_at(params["layers"], target.path)["kernel"]
        arrays = _target_arrays(folder, adapters, target, slots, kernel, tensors)
        tree = merged_trees(tree, nested(("layers", *target.path), arrays))
    tree = merged_trees(tree, _saved_arrays(folder, adapters, slots, params, tensors))
    if _PREFIX + SCORE in tensors:
        raise InputError(
            f"{folder} is an adapter of a reward model; give it to load_reward_model as "
            "adapter_path, or open the merged reward model, hf/ of its run."
        )
    if tensors:
        raise InputError(
            f"{folder / WEIGHTS}: the tensor {min(tensors)!r} is of no module that the adapter's "
            "configuration names; save the adapter again."
        )
    shardings = None if mesh is None else tree_shardings(mesh, tree, model.partition_rules)
    params = merged_trees(params, _placed(tree, shardings))
    return dataclasses.replace(model, adapters=adapters), params


def read_reward_adapter(
    folder: str | pathlib.Path,
    base: str | pathlib.Path,
    model: Any,
    slots: Mapping[str, Slot],
    params: Params,
    mesh: Mesh | None = None,
) -> tuple[Any, Params]:
    """As `read_adapter`, of {"model": ..., "head": ...}, whose head is that of the adapter.

    Args:
      params: {"model": ...} of the base, and "head" where it is a reward model itself.

    Raises:
      InputError: as `read_adapter`, or neither the adapter nor the base has a head.
    """
    width = model.config.n_embd
    slots = {**slots, SCORE: Slot(("head", "kernel"), None, (1, width))}
    head = {"kernel": jax.ShapeDtypeStruct((width,), np.float32)}
    model, both = read_adapter(folder, base, model, slots, {**params["model"], "head": head}, mesh)
    head = both.pop("head")
    if not isinstance(head["kernel"], jax.Array):
        if "head" not in params:
            raise InputError(
                f"{folder} holds no {SCORE!r}, and neither does its base, so that there is no head "
                "of a reward model; load it as a language model."
            )
        head = params["head"]
    return model, {"model": both, "head": head}


def _warn_of_base(folder, named, base):
    paths = [pathlib.Path(str(x)).expanduser().resolve() for x in (named or base, base)]
    # An address is that of a folder whose files were copied.
    if paths[0] != paths[1] and "://" not in str(named):
        logger.warning(
            "The adapter in %s is of the base %s and now beside %s: its results are other ones "
            "unless the two are equal.",
            folder,
            named,
            base,
        )


def _saved_arrays(folder, adapters, slots, params, tensors):
    """The parameters of modules that are stored in full."""
    arrays: dict[tuple[str, ...], np.ndarray] = {}
    for name, slot in slots.items():
        if not adapters.is_saved(slot.path):
            continue
        values = _pop_tensor(folder, tensors, _PREFIX + name, slot.shape)
        values = values.T if slot.transposed else values
        shape = leaf_at(params, slot.path).shape
        full = arrays.setdefault(slot.path, np.zeros(shape, np.float32))
        if slot.layer is None:
            values = values.reshape(-1, *shape[1:])  # [1, D] of a head is [D]
            full[: len(values)] = values  # the padding of the vocabulary is not in the file
        else:
            full[slot.layer] = values.reshape(shape[1:])
    trees = (nested(path, full) for path, full in arrays.items())
    return functools.reduce(merged_trees, trees, {})


def _placed(tree, shardings):
    if shardings is None:
        return jax.tree.map(jax.numpy.array, tree)
    return jax.tree.map(hosts.spanning_array, shardings, tree)


def _read_tensors(file):
    """float32 of every tensor, by its name."""
    if not file.is_file():
        raise InputError(f"{file.parent} holds no {file.name}; give the folder of a saved adapter.")
    tensors = {}
    try:
        with contextlib.ExitStack() as files:
            opened = files.enter_context(safe_open(file, framework="numpy"))
            for name in opened.keys():  # noqa: SIM118, the file is no mapping
                data = opened.get_slice(name)
                check_float(f"{file}: the tensor {name!r}", data.get_dtype())
                tensors[name] = TensorFile(file, name, data).read((slice(None),))
    except SafetensorError as error:
        raise unreadable(file, error) from error
    return tensors


def _pop_tensor(folder, tensors, name, shape):
    """Removes a tensor from those that were read, and returns it."""
    if name not in tensors:
        raise InputError(
            f"{folder / WEIGHTS} lacks the tensor {name!r}, which the adapter's configuration "
            "needs on this base; give the base that it was trained on, or save it again."
        )
    values = tensors.pop(name)
    if values.shape != tuple(shape):
        raise InputError(
            f"{folder / WEIGHTS}: the tensor {name!r} has shape {list(values.shape)}, but this "
            f"base needs {list(shape)}; give the base that it was trained on."
        )
    return values


def _target_arrays(folder, adapters, target, slots, kernel, tensors):
    """The arrays beside a kernel [N, D, *features], of the tensors of its layers."""
    number, width, *features = kernel.shape
    outputs = int(np.prod(features))
    a = np.zeros((number, width, target.rank), np.float32)
    b = np.zeros((number, target.rank, *features), np.float32)
    if adapters.use_dora:  # of no effect in layers without an adapter
        magnitude = np.array(hosts.to_host(jax.jit(jax.vmap(column_norms))(kernel)), np.float32)
    for layer, name in _names_of(target, slots):
        rank = target.ranks[layer]
        a[layer, :, :rank] = _pop_tensor(folder, tensors, f"{name}.lora_A.weight", (rank, width)).T
        values = _pop_tensor(folder, tensors, f"{name}.lora_B.weight", (outputs, rank))
        b[layer, :rank] = values.T.reshape(rank, *features)
        if adapters.use_dora:
            values = _pop_tensor(folder, tensors, f"{name}.lora_magnitude_vector", (outputs,))
            magnitude[layer] = values.reshape(features)
    arrays = {"lora_a": a, "lora_b": b, "lora_scale": adapters.scales(target)}
    if adapters.dropout:
        arrays["lora_dropout"] = np.full(number, adapters.dropout, np.float32)
    return arrays | ({"lora_magnitude": magnitude} if adapters.use_dora else {})


def _names_of(target, slots):
    """(layer, name of the module with PEFT's prefix) of each adapter of a target."""
    for name, path, layer in kernel_modules(slots):
        if path == ("layers", *target.path) and target.ranks[layer]:
            yield layer, _PREFIX + name


def write_adapter(
    folder: str | pathlib.Path,
    adapters: Adapters,
    slots: Mapping[str, Slot],
    params: Params,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Writes a folder in PEFT's format; all hosts have to call it.

    Args:
      params: with the adapters.
      config: keys of adapter_config.json beside those of the adapters.
      tensors: further ones, by their full names, such as a head's.
    """
    written = {_PREFIX + name: values for name, values in tensors.items()}
    for target in adapters.targets:
        arrays = hosts.to_host(leaf_at(params["layers"], target.path))
        written |= _target_tensors(adapters, target, slots, arrays)
    for name, slot in slots.items():
        if adapters.is_saved(slot.path):
            leaf = hosts.to_host(leaf_at(params, slot.path))
            values = np.asarray(leaf if slot.layer is None else leaf[slot.layer], np.float32)
            values = (values.T if slot.transposed else values)[: slot.shape[0]]
            written[_PREFIX + name] = values.reshape(slot.shape)
    hosts.from_first(_write, folder, written_config(adapters, config), written)


def _target_tensors(adapters, target, slots, arrays):
    tensors = {}
    for layer, name in _names_of(target, slots):
        rank = target.ranks[layer]
        a, b = arrays["lora_a"][layer][:, :rank], arrays["lora_b"][layer][:rank]
        if adapters.is_pissa:  # A B - A0 B0 as one product, of a base that was not changed
            a = np.concatenate([a, arrays["lora_start_a"][layer][:, :rank]], axis=1)
            b = np.concatenate([b, -arrays["lora_start_b"][layer][:rank]])
        tensors[f"{name}.lora_A.weight"] = np.asarray(a.T, np.float32)
        tensors[f"{name}.lora_B.weight"] = np.asarray(b.reshape(len(b), -1).T, np.float32)
        if adapters.use_dora:
            magnitude = np.asarray(arrays["lora_magnitude"][layer], np.float32)
            tensors[f"{name}.lora_magnitude_vector"] = magnitude.reshape(-1)
    return tensors


def _write(folder, config, tensors):
    path = pathlib.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, x in sorted(tensors.items())
    }
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as name:
        temporary = pathlib.Path(name)
        write_safetensors(temporary / WEIGHTS, shapes, iter([tensors[n] for n in shapes]))
        write_json(temporary / CONFIG, config)
        for file in (CONFIG, WEIGHTS):
            (temporary / file).replace(path / file)
