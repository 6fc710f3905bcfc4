"""Adapters of a language model: which kernels have one, their arrays, and the frozen base.

`Dense` computes with them (`models/dense.py`). In the stacked layers an adapter is stacked like its
kernel: A is [N, D, r] and B is [N, r, *features]. r is the highest rank of the layers; columns of A
and rows of B beyond the rank of a layer, and both of a layer without an adapter, are zero and stay
zero in training.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.adapter_settings import Base
from rlhf_jax.models.dense import BESIDE_KERNEL, column_norms, effective_kernel
from rlhf_jax.models.family import leaf_at
from rlhf_jax.models.interface import Params

Path = tuple[str, ...]

_TRAINED = ("lora_a", "lora_b", "lora_magnitude")
_INT8_MAX = 127


class Target(NamedTuple):
    """A module of the layers whose kernels have adapters.

    Attributes:
      path: in the parameters of a layer, such as ("self_attn", "q_proj").
      ranks: of each layer; 0 for a layer without an adapter.
      alphas: of each layer.
    """

    path: Path
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The highest one."""
        return max(self.ranks)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a model, a part of its static description (`StackedModel.adapters`).

    Attributes:
      targets: in the order of the modules in the model.
      saved: paths of modules that are trained in full.
      dropout: of the inputs of adapters.
      use_rslora, use_dora: as in `LoraSettings`.
      is_pissa: whether A and B start from the kernel's largest singular values.
      base: the type of the frozen kernels and embeddings.
      is_fresh: whether the model started training as the base alone; else it was read with them.
      source: the adapter_config.json, as JSON.
    """

    targets: tuple[Target, ...]
    saved: tuple[Path, ...] = ()
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    is_pissa: bool = False
    base: Base = "float32"
    is_fresh: bool = False
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    @property
    def lowest_layer(self) -> int:
        """The lowest layer with a trained parameter; the number of layers if there is none."""
        if any(path[0] == "layers" for path in self.saved):
            return 0
        adapted = np.any([target.ranks for target in self.targets], axis=0)
        return int(np.argmax(adapted)) if adapted.any() else len(adapted)

    def is_saved(self, path: Path) -> bool:
        """Whether the module, or the array, at a path is trained in full."""
        return any(path[: len(each)] == each for each in self.saved)

    def scales(self, target: Target) -> np.ndarray:
        """f32[N]: the factor of A B in each layer; 0 without an adapter."""
        ranks = np.maximum(np.array(target.ranks, np.float64), 1.0)
        scales = np.array(target.alphas) / (np.sqrt(ranks) if self.use_rslora else ranks)
        return np.where(np.array(target.ranks) > 0, scales, 0.0).astype(np.float32)


def adapters_of(model: Any) -> Adapters | None:
    """The adapters of a model; None of one without, and of a family that knows none."""
    return getattr(model, "adapters", None)


def merged_trees(below: Params, above: Params) -> Params:
    """A tree of dicts with the leaves of both; of a path that both have, those of `above`."""
    merged = dict(below)
    for name, part in above.items():
        both = isinstance(part, dict) and isinstance(merged.get(name), dict)
        merged[name] = merged_trees(merged[name], part) if both else part
    return merged


def without_adapters(params: Params) -> Params:
    """The parameters, or a part of them, without the arrays of adapters."""
    return _filtered(params, lambda path: not path[-1].startswith("lora_"))


def plain_params(params: Params) -> Params:
    """The parameters without any arrays beside kernels: as a model without adapters has them."""
    return _filtered(params, lambda path: path[-1] not in BESIDE_KERNEL)


def split_adapters(adapters: Adapters, params: Params) -> tuple[Params, Params]:
    """(trained, frozen) parts of the parameters: A, B and modules in full; and all others."""

    def is_trained(path: Path) -> bool:
        return adapters.is_saved(path) or path[-1] in _TRAINED

    trained = _filtered(params, is_trained)
    return trained, _filtered(params, lambda path: not is_trained(path))


def _filtered(tree: Params, keeps: Callable[[Path], bool], path: Path = ()) -> Params:
    """The tree of dicts with the leaves whose path is kept, without empty dicts."""
    kept = {}
    for name, part in tree.items():
        if isinstance(part, dict):
            if part := _filtered(part, keeps, (*path, name)):
                kept[name] = part
        elif keeps((*path, name)):
            kept[name] = part
    return kept


# --- arrays of adapters -----------------------------------------------------------------------


def adapter_arrays(adapters: Adapters, params: Params, key: jax.Array) -> Params:
    """A tree with the arrays of fresh adapters beside the kernels of `params`, for a jitted call.

        A ~ U(-1 / sqrt(D), 1 / sqrt(D)),   B = 0

    as PEFT starts them, or with PiSSA A0 = U sqrt(S / scale) and B0 = sqrt(S / scale) V of the r
    largest singular values of W = U S V.

    Args:
      params: full parameters, without adapters, the frozen ones in the type of the base.
    """
    tree: Params = {}
    for target in adapters.targets:
        module = leaf_at(params["layers"], target.path)
        kernel = module["kernel"]
        number, width, *features = kernel.shape
        keys = jax.random.fold_in(key, zlib.crc32("/".join(target.path).encode()))
        scale = jnp.asarray(adapters.scales(target))
        is_used = np.arange(target.rank) < np.array(target.ranks)[:, None]  # [N, r]
        parts = {"lora_scale": scale}
        if adapters.is_pissa:
            parts_of_kernel = {k: x for k, x in module.items() if k in ("kernel", "kernel_scale")}
            a, b = _principal_parts(parts_of_kernel, scale, target.rank)
            a, b = a * is_used[:, None], b * is_used.reshape(*is_used.shape, *[1] * len(features))
            parts |= {"lora_start_a": a, "lora_start_b": b}
            a, b = jnp.copy(a), jnp.copy(b)
        else:
            a = jax.random.uniform(keys, (number, width, target.rank), jnp.float32, -1.0, 1.0)
            a = jnp.where(is_used[:, None], a * width**-0.5, 0.0)
            b = jnp.zeros((number, target.rank, *features), jnp.float32)
        parts |= {"lora_a": a, "lora_b": b}
        if adapters.dropout:
            parts["lora_dropout"] = jnp.full(number, adapters.dropout, jnp.float32)
        if adapters.use_dora:
            parts["lora_magnitude"] = jax.vmap(column_norms)(kernel)
        tree = merged_trees(tree, nested(("layers", *target.path), parts))
    return tree


def _principal_parts(module, scale, rank):
    """(A [N, D, r], B [N, r, *features]) of the largest singular values, one layer at a time."""

    def of_layer(layer):
        parts, scale = layer
        kernel = effective_kernel(parts)
        left, values, right = jnp.linalg.svd(kernel.reshape(len(kernel), -1), full_matrices=False)
        roots = jnp.sqrt(values[:rank] / jnp.where(scale > 0, scale, 1.0))
        return left[:, :rank] * roots, roots[:, None] * right[:rank]

    a, b = jax.lax.map(of_layer, (module, scale))
    return a, b.reshape(*b.shape[:2], *module["kernel"].shape[2:])


def nested(path: Path, tree: Params) -> Params:
    """A tree of dicts with another one at a path."""
    return functools.reduce(lambda inner, name: {name: inner}, reversed(path), tree)


# --- the frozen base --------------------------------------------------------------------------


def frozen_module(module: Params, base: Base) -> Params:
    """A module's kernel or embedding in the type of the base; other arrays as they are.

        int8:   q = round(W / s),   s = max_D |W| / 127        for each output

    and W is q s. Embeddings are then bfloat16.
    """
    if base == "float32" or "kernel_scale" in module:
        return module
    if base == "int8" and "kernel" in module:
        return {**module, **_quantized(module["kernel"])}
    names = ("kernel", "embedding")
    return {name: x.astype("bfloat16") if name in names else x for name, x in module.items()}


def _quantized(kernel):
    """{"kernel": i8[N, D, ...], "kernel_scale": f32[N, ...]}."""
    highest = jnp.max(jnp.abs(kernel), axis=1)
    scale = jnp.where(highest > 0, highest, 1.0) / _INT8_MAX
    values = jnp.round(kernel.astype(jnp.float32) / scale[:, None]).astype(jnp.int8)
    return {"kernel": values, "kernel_scale": scale.astype(jnp.float32)}


def modules(tree: Params, path: Path = ()) -> Iterator[tuple[Path, Params]]:
    """(path, arrays) of each dict of arrays."""
    if arrays := {name: part for name, part in tree.items() if not isinstance(part, dict)}:
        yield path, arrays
    for name, part in tree.items():
        if isinstance(part, dict):
            yield from modules(part, (*path, name))


def frozen_base(
    adapters: Adapters, params: Params, freeze: Callable[[Path, Params], Params] | None = None
) -> Params:
    """The parameters with the frozen ones in the type of the base.

    Args:
      freeze: (path, module) -> the module in that type; None for `frozen_module`.
    """
    tree: Params = {}
    for path, module in modules(params):
        if not adapters.is_saved(path):
            module = freeze(path, module) if freeze else frozen_module(module, adapters.base)
        tree = merged_trees(tree, nested(path, module))
    return tree


def with_adapters(model: Any, params: Params, key: jax.Array) -> Params:
    """Full parameters of a model, without adapters, with fresh ones beside the frozen base."""
    base = frozen_base(model.adapters, params)
    return merged_trees(base, adapter_arrays(model.adapters, base, key))


def fresh_params(model: Any, key: jax.Array) -> Params:
    """Fresh parameters, with adapters where the model has them; for shapes."""
    params = model.init(key)
    return params if adapters_of(model) is None else with_adapters(model, params, key)


# --- merged and padded ------------------------------------------------------------------------


def merge_adapter(model: Any, params: Params) -> tuple[Any, Params]:
    """The model without adapters, whose kernels are float32 sums W + scale * (A B - A0 B0).

    With DoRA these are scaled to its norms; an int8 or bfloat16 base becomes float32.
    """
    tree: Params = {}
    for path, arrays in modules(params):
        merged = {k: x.astype(jnp.float32) for k, x in arrays.items() if k not in BESIDE_KERNEL}
        if len(merged) < len(arrays):
            parts = {k: x for k, x in arrays.items() if k in ("kernel", *BESIDE_KERNEL)}
            merged["kernel"] = jax.vmap(effective_kernel)(parts)
        tree = merged_trees(tree, nested(path, merged))
    return dataclasses.replace(model, adapters=None), tree


def padded_like(stack: Params, other: Params) -> Params:
    """Layers without adapters, with arrays beside the kernels as `other` has them: of no effect."""
    tree = stack
    for path, arrays in modules(other):
        own = leaf_at(stack, path)
        missing = {}
        for name in arrays.keys() - own.keys():
            missing[name] = jnp.zeros(
                (own["kernel"].shape[0], *arrays[name].shape[1:]), arrays[name].dtype
            )
            if name == "lora_magnitude":
                missing[name] = jax.vmap(column_norms)(own["kernel"])
        if missing:
            tree = merged_trees(tree, nested(path, missing))
    return tree
