"""From the path of a parameter to its sharding on the mesh.

A model has rules: pairs of a regular expression and a `PartitionSpec` (`Model.partition_rules`).
The first pattern that the end of a path matches decides. Moments of an optimizer end with the paths
of their parameters. Stacked layers have a leading axis that is never split.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the batch is split over both together

Rules = tuple[tuple[str, PartitionSpec], ...]


def partition_spec(path: str, ndim: int, rules: Rules) -> PartitionSpec:
    """The spec of the array at a path such as `params/layers/attn/c_attn/kernel`.

    An array of at most one axis that no rule names is replicated.

    Raises:
      ValueError: no rule names the path, and the array has several axes.
    """
    for pattern, spec in rules:
        if re.search(rf"(^|/)({pattern})$", path):
            return spec
    if ndim <= 1:
        return PartitionSpec()
    raise ValueError(
        f"no partition rule covers {path!r}, an array of {ndim} axes; add one to the "
        "partition_rules of its model."
    )


def tree_shardings(mesh: Mesh, tree: Any, rules: Rules) -> Any:
    """A NamedSharding for each array, or abstract array, of a state or of parameters.

    Args:
      rules: of the model, and of any other model whose parameters the tree holds.

    Raises:
      InputError: an axis of an array is not divisible by its axes of the mesh.
      ValueError: no rule names an array of several axes.
    """

    def sharding(path, leaf):
        name, shape = path_name(path), leaf.shape
        spec = partition_spec(name, len(shape), rules)
        for size, axis in zip(shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise InputError(
                    f"{name} has shape {shape}, of which {size} is not divisible by mesh.{axis} = "
                    f"{mesh.shape[axis]}; choose a {axis} that divides it."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same full array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, name: str, batch_size: int) -> None:
    """Raises an InputError that names the setting if the mesh does not divide the batch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise InputError(
            f"{name} = {batch_size} is not divisible by mesh data x fsdp = {parts} devices."
        )


def path_name(path: tuple[Any, ...]) -> str:
    """A path of a tree, as rules match it: `params/layers/attn/c_attn/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
