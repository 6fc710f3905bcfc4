"""PEFT's `adapter_config.json`: which modules of a model have adapters, and of which rank.

The format and the rules by which names of modules are matched are those of peft 0.21. A setting
that would change the numbers and is not computed here raises an InputError that names it.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_jax.errors import InputError
from rlhf_jax.models.adapter_settings import LoraSettings
from rlhf_jax.models.adapters import Adapters, Path, Target
from rlhf_jax.models.config_values import integer, is_true, positive
from rlhf_jax.models.family import Slot
from rlhf_jax.models.folders import read_json

CONFIG = "adapter_config.json"

_READ = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "use_rslora",
    "use_dora",
)
# Keys that change no number of a saved adapter; `fan_in_fan_out` says how the base is stored.
_UNUSED = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
_CHECKED = {"peft_type": ("LORA",), "bias": ("none",)}
_HEADS = ("classifier", "score")  # which PEFT adds to modules_to_save of sequence classifiers
# The other ways to start change the base as well, which its folder does not hold.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class KernelModule(NamedTuple):
    """A module of a layer with a kernel: its name in Hugging Face's files, and its place."""

    name: str
    path: Path
    layer: int


def config_of_settings(settings: LoraSettings) -> dict[str, Any]:
    """The object in adapter_config.json for fresh adapters."""
    modules: Any = list(settings.target_modules)
    return {
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": "all-linear" if modules == ["all-linear"] else modules,
        "layers_to_transform": list(settings.layers_to_transform) or None,
        "modules_to_save": list(settings.modules_to_save) or None,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
    }


def read_adapter_config(folder: pathlib.Path) -> dict[str, Any]:
    """The object in a folder's adapter_config.json.

    Raises:
      InputError: it is missing, or has a setting that is not computed here.
    """
    file = folder / CONFIG
    data = {key: value for key, value in read_json(file).items() if value is not None}
    for key, allowed in _CHECKED.items():
        if data.get(key, allowed[0]) not in allowed:
            raise InputError(
                f"{file}: {key} is {data[key]!r}, but only {allowed[0]!r} is supported."
            )
    start = data.get("init_lora_weights", True)
    if start not in _STARTS:
        raise InputError(
            f"{file}: init_lora_weights is {start!r}, which changes the base too; save the adapter "
            "with path_initial_model_for_weight_conversion, which makes a plain one of it."
        )
    known = {*_READ, *_UNUSED, *_CHECKED, "init_lora_weights"}
    for key in sorted(data.keys() - known):
        if data[key]:
            raise InputError(f"{file}: {key} is {data[key]!r}, but is not supported.")
    return data


def resolve_adapters(
    data: Mapping[str, Any], model: Any, slots: Mapping[str, Slot], where: str, **options: Any
) -> Adapters:
    """The adapters of a model by the object in adapter_config.json.

    Args:
      slots: every tensor of the model, by its full name.
      where: the file or section, for messages.
      options: `base`, `is_pissa` and `is_fresh` of `Adapters`.

    Raises:
      InputError: a value is not of its type or range, or no layer has a module that is named.
    """
    try:
        return _resolve(data, model, slots, options)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _resolve(data, model, slots, options):
    rank, alpha = integer("r", data.get("r", 8)), positive("lora_alpha", data.get("lora_alpha", 8))
    kernels = list(kernel_modules(slots))
    saved = _saved_paths(data.get("modules_to_save") or [], model, slots)
    chosen = [each for each in kernels if _is_target(data, each.name, saved, each.path)]
    _check_names(data, kernels, chosen)
    ranks, alphas = data.get("rank_pattern") or {}, data.get("alpha_pattern") or {}
    by_path: dict[Path, dict[int, tuple[int, float]]] = {}
    for name, path, layer in chosen:
        own_rank = integer("rank_pattern", _by_pattern(ranks, name, rank))
        if options.get("is_pissa"):
            _check_pissa(name, slots[f"{name}.weight"], own_rank)
        own_alpha = positive("alpha_pattern", _by_pattern(alphas, name, alpha))
        by_path.setdefault(path[1:], {})[layer] = own_rank, own_alpha
    count = 1 + max(each.layer for each in kernels)
    targets = []
    for path, layers in by_path.items():
        pairs = [layers.get(layer, (0, 1.0)) for layer in range(count)]
        targets.append(Target(path, *map(tuple, zip(*pairs, strict=True))))
    adapters = Adapters(
        tuple(targets),
        tuple(sorted(saved)),
        float(data.get("lora_dropout") or 0.0),
        is_true(data, "use_rslora"),
        is_true(data, "use_dora"),
        source=json.dumps(dict(data), sort_keys=True),
        **options,
    )
    _check_dora(adapters)
    return adapters


def kernel_modules(slots: Mapping[str, Slot]) -> Iterator[KernelModule]:
    """Every module with a kernel, in the order of the layers."""
    for name, slot in slots.items():
        if slot.path[-1] == "kernel" and slot.layer is not None:
            yield KernelModule(name.removesuffix(".weight"), slot.path[:-1], slot.layer)


def _saved_paths(names, model, slots):
    """Paths of the modules that are trained in full."""
    saved = set()
    for name in names:
        pattern = rf"(^|.*\.){name}($|\..*)"
        paths = {
            slot.path[:-1]
            for each, slot in slots.items()
            if re.match(pattern, each.rpartition(".")[0])
        }
        if not paths and name not in _HEADS:
            raise InputError(f"modules_to_save names {name!r}, which the model does not have.")
        if model.output == model.table and (model.table,) in paths:
            raise InputError(
                f"modules_to_save names {name!r}, whose matrix is the unembedding too, and PEFT "
                "trains them apart; leave it out, for a model with tied embeddings."
            )
        saved |= paths
    return saved


def _is_target(data, name, saved, path):
    """Whether PEFT gives the module an adapter."""
    excluded, targets = data.get("exclude_modules"), data.get("target_modules")
    if excluded and _matches(excluded, name):
        return False
    if any(path[: len(each)] == each for each in saved):
        return False
    if targets == "all-linear":
        return True
    if not _matches(targets or [], name):
        return False
    layers = data.get("layers_to_transform")
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    patterns = data.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
    index = next((int(match[1]) for match in matches if match), None)
    return index in ([layers] if isinstance(layers, int) else layers)


def _matches(targets, name):
    """Whether a name is one of the targets, ends with one, or matches the expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in targets)


def _by_pattern(patterns, name, default):
    """The value of the first pattern that the end of a name matches."""
    matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", name))
    return next((patterns[key] for key in matching), default)


def _check_names(data, kernels, chosen):
    """Raises an InputError if a target is no module of the layers."""
    targets = data.get("target_modules")
    known = sorted({each.path[-1] for each in kernels})
    if isinstance(targets, list):
        for target in targets:
            if not any(_matches([target], each.name) for each in kernels):
                raise InputError(
                    f"target_modules names {target!r}, which is no linear module of the layers: "
                    f"these have {', '.join(known)}, or all-linear."
                )
    if not chosen:
        raise InputError(
            f"target_modules {targets!r} leaves no module of a layer: these have "
            f"{', '.join(known)}, or all-linear, in layers 0 to {max(e.layer for e in kernels)}."
        )


def _check_pissa(name, slot, rank):
    """Raises an InputError if a kernel has fewer singular values than the rank."""
    if rank > min(slot.shape):
        raise InputError(
            f"r is {rank}, but init pissa starts from the singular values of {name}, of which "
            f"there are {min(slot.shape)}; lower it, or set init to default."
        )


def _check_dora(adapters):
    """Raises an InputError if a magnitude would be trained in a layer without an adapter."""
    first = adapters.lowest_layer
    is_partial = any(0 in target.ranks[first:] for target in adapters.targets)
    if adapters.use_dora and is_partial:
        raise InputError(
            "use_dora needs each of its modules in all layers from the lowest one on; leave "
            "layers_to_transform out, or name the upper layers."
        )


def written_config(adapters: Adapters, config: Mapping[str, Any]) -> dict[str, Any]:
    """The object in adapter_config.json of adapters, with further keys."""
    data = json.loads(adapters.source)
    if data.get("target_modules") == "all-linear":
        data["target_modules"] = sorted({target.path[-1] for target in adapters.targets})
    if adapters.is_pissa:
        # scale * [A, A0] [B, -B0], of twice the rank, with the same scale
        factor = 2**0.5 if adapters.use_rslora else 2
        data["r"] *= 2
        data["lora_alpha"] *= factor
        data["rank_pattern"] = {k: 2 * v for k, v in (data.get("rank_pattern") or {}).items()}
        patterns = (data.get("alpha_pattern") or {}).items()
        data["alpha_pattern"] = {k: factor * v for k, v in patterns}
    fixed = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True, "inference_mode": True}
    return {**data, **fixed, **config}
