"""From the path of a parameter to its place on the mesh."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # rows of a batch are split over both together

# The first pattern that a path ends with decides. Optimizer moments end with the paths of their
# parameters. Stacked layers have a leading axis that is never split.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"wte/embedding", PartitionSpec("tensor", "fsdp")),
    (r"wpe/embedding", PartitionSpec(None, "fsdp")),
    (r"c_attn/kernel", PartitionSpec(None, "fsdp", None, "tensor")),
    (r"c_attn/bias", PartitionSpec(None, None, "tensor")),
    (r"c_fc/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"c_proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"c_fc/bias", PartitionSpec(None, "tensor")),
)
# Replicated on purpose: they are small, and every device needs them whole.
REPLICATED = (
    r"(ln_1|ln_2|ln_f)/(scale|bias)",
    r"c_proj/bias",
    r"(head|value_head)/(kernel|bias)",
    r"(step|count|kl_coef|penalty_coef)",
    r"score_stats/(num_scores|mean|m2)",
)


def partition_spec(path: str) -> PartitionSpec:
    """The spec of the array at a path such as `params/layers/attn/c_attn/kernel`.

    Raises:
      ValueError: no rule covers the path.
    """
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", path):
            return spec
    if any(re.search(rf"(^|/){pattern}$", path) for pattern in REPLICATED):
        return PartitionSpec()
    raise ValueError(f"no partition rule covers {path!r}; add one to RULES or to REPLICATED.")


def layer_spec(path: str) -> PartitionSpec:
    """The spec of one layer's array, say at `attn/c_attn/kernel`: that of the stack, without it."""
    return PartitionSpec(*partition_spec(path)[1:])


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for each array, or abstract array, of a state or of parameters.

    Raises:
      InputError: an axis of an array is not divisible by its axes of the mesh.
    """

    def sharding(path, leaf):
        name = path_name(path)
        spec = partition_spec(name)
        _check_divides(mesh, name, leaf.shape, spec)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, name: str, batch_size: int) -> None:
    """Raises an InputError that names the setting if the rows do not divide over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise InputError(
            f"{name} = {batch_size} is not divisible by mesh data x fsdp = {parts} devices."
        )


def check_heads(mesh: Mesh, n_head: int) -> None:
    """Raises an InputError if the heads of attention cannot be split as the rules say."""
    parts = mesh.shape["tensor"]
    if n_head % parts:
        raise InputError(
            f"The model has n_head = {n_head} heads of attention, which are not divisible by "
            f"mesh.tensor = {parts}; choose a tensor that divides them, or use fsdp instead."
        )


def _check_divides(mesh, name, shape, spec):
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise InputError(
                f"{name} has shape {shape}, of which {size} is not divisible by mesh.{axis} = "
                f"{mesh.shape[axis]}; choose a {axis} that divides it."
            )


def path_name(path: tuple[Any, ...]) -> str:
    """A path of a tree, as the rules have it: `params/layers/attn/c_attn/kernel`."""
    return "/".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    """The plain name of one step of a tree path: a dict key, a field, or an index."""
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name
    return str(key)
