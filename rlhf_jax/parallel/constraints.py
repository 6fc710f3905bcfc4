"""Sharding constraints inside a step: activations stay, parameters are gathered.

Each layer's parameters are gathered when the layer needs them, in the compute dtype, and its
gradients are reduced and scattered right behind it (Rajbhandari et al. 2020, ZeRO, stage 3;
arXiv:1910.02054). Without constraints the compiler may gather activations and add up partial
products instead. All functions do nothing unless the program is traced under `jax.set_mesh` with a
mesh of `make_mesh` with more than one device.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from rlhf_jax.parallel.partition import AXES, BATCH_AXES, Rules, partition_spec, path_name


def padded_batch_size(count: int) -> int:
    """`count` rounded up to a batch size that `constrain_batch` splits."""
    mesh = _mesh()
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return -(-count // parts) * parts


def constrain_batch(x: jax.Array, *, last: str | None = None) -> jax.Array:
    """The array with axis 0 split over `data` and `fsdp`, and no other axis.

    Args:
      last: the axis of the mesh that the last axis of the array is split over, if any.

    An axis that does not divide is not split.
    """
    return _constrain(x, (0, BATCH_AXES), (-1, last))


def constrain_batch_over_data(x: jax.Array, *, last: str | None = None) -> jax.Array:
    """The array with axis 0 split over `data` alone, so that parameters stay split over `fsdp`.

    In decoding, moving the activations of single tokens costs less than gathering parameters. For
    the token embedding it does in training too: a vocabulary is larger than a device's part of the
    batch, and the gradient of a gathered table is as large again. Otherwise as `constrain_batch`.
    """
    return _constrain(x, (0, ("data",)), (-1, last))


def constrain_batch_over_all(x: jax.Array) -> jax.Array:
    """Axis 0 split over all devices if they divide it, else as `constrain_batch`."""
    mesh = _mesh()
    divides = mesh is not None and x.shape[0] % mesh.size == 0
    return _constrain(x, (0, AXES if divides else BATCH_AXES))


def constrain_cache(x: jax.Array) -> jax.Array:
    """Keys or values [N, B, H, C, d]: B as in `constrain_batch`, H over `tensor`."""
    return _constrain(x, (1, BATCH_AXES), (2, "tensor"))


def constrain_heads(x: jax.Array) -> jax.Array:
    """[B, L, H, d]: B as in `constrain_batch`, H over `tensor`."""
    return _constrain(x, (0, BATCH_AXES), (2, "tensor"))


def constrain_vocabulary(table: jax.Array) -> jax.Array:
    """A table [V, D] with V split over `fsdp` and `tensor`, filled up with zeros to divide."""
    mesh = _mesh()
    if mesh is None:
        return table
    names = ("fsdp", "tensor")
    missing = -len(table) % math.prod(mesh.shape[name] for name in names)
    return _constrain(jnp.pad(table, [(0, missing), (0, 0)]), (0, names))


def map_over_data(
    function: Callable[..., Any], examples: tuple[jax.Array, ...], shared: tuple[Any, ...]
) -> Any:
    """function(*examples, *shared), on the devices of each part of `data` for its examples alone.

    Its sums over examples, and so the gradients of the shared arrays, are then summed over `data`
    once and not in each step of a loop. `fsdp` and `tensor` stay with the compiler; the examples
    are not split over them, so that shared arrays can be.

    Args:
      function: its results of at least one axis are [B, ...] again; its scalars are sums over
        examples, which are added up.
      examples: arrays [B, ...].
      shared: arrays that all examples share.
    """
    mesh = _mesh()
    if mesh is None:
        return function(*examples, *shared)
    examples = tuple(map(constrain_batch_over_data, examples))
    call, by_data, full = function, PartitionSpec("data"), PartitionSpec()
    if mesh.shape["data"] > 1 and examples[0].shape[0] % mesh.shape["data"] == 0:
        shapes = jax.eval_shape(function, *examples, *shared)

        def of_part(*arrays):
            results = function(*arrays)
            return jax.tree.map(lambda x: x if x.ndim else jax.lax.psum(x, "data"), results)

        call = jax.shard_map(
            of_part,
            in_specs=(by_data,) * len(examples) + (full,) * len(shared),
            out_specs=jax.tree.map(lambda x: by_data if x.ndim else full, shapes),
            axis_names={"data"},
        )
    results = call(*examples, *shared)
    return jax.tree.map(lambda x: constrain_batch(x) if x.ndim else x, results)


def _constrain(x: jax.Array, *split: tuple[int, tuple[str, ...] | str | None]) -> jax.Array:
    """The array with these axes split over axes of the mesh, where they divide."""
    mesh = _mesh()
    if mesh is None:
        return x
    spec: list[Any] = [None] * x.ndim
    for axis, names in split:
        parts = (names,) if isinstance(names, str) else names or ()
        if parts and x.shape[axis] % math.prod(mesh.shape[part] for part in parts) == 0:
            spec[axis] = names
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def all_gather(params: Any, dtype: str, rules: Rules, *, is_layer: bool = False) -> Any:
    """Parameters gathered over `fsdp`, as products need them: split over `tensor` alone.

    They are cast to the compute dtype first, which halves the traffic in bfloat16. In the backward
    pass their gradients are split as the parameters are.

    Args:
      params: a part of a model's parameters, at paths that its rules match.
      rules: `Model.partition_rules`.
      is_layer: whether these are of one layer, without the axis of layers.
    """
    mesh = _mesh()
    if mesh is None:
        return params

    def of(path, leaf):
        name = path_name(path)
        spec = partition_spec(name, leaf.ndim + is_layer, rules)
        spec = PartitionSpec(*spec[1:]) if is_layer else spec
        if "fsdp" not in spec:
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # quantized, and frozen
            return _gathered(leaf, spec)
        return _all_gather(leaf.astype(dtype), spec)

    return jax.tree_util.tree_map_with_path(of, params)


def remat_all_gather(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body of a scan over layers, whose backward pass gathers parameters again.

    Otherwise it would keep those gathered for the forward pass: the full model on each device.
    Nothing else is computed again, except casts and operations of similar cost.
    """
    mesh = _mesh()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return body
    # In a scan the compiler cannot merge the two computations, which is what CSE would do.
    return jax.checkpoint(body, prevent_cse=False, policy=_is_kept)


# The primitives of `all_gather`. Not to save its result is not enough: its input after the cast
# would be saved in its place.
_ALL_GATHER = {
    "convert_element_type",
    "copy",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "reshape",
    "sharding_constraint",
}


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _ALL_GATHER


def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    gathered = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(leaf, gathered)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_gather(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    return _gathered(leaf, spec)


def _all_gather_forward(leaf, spec):
    return _all_gather(leaf, spec), None


def _all_gather_backward(spec, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, spec),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def _mesh() -> Any:
    """The mesh that is set, if it has our axes, of type `AxisType.Auto`, and several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = set(mesh.axis_names) == set(AXES) and mesh.size > 1
    return mesh if ours and set(mesh.axis_types) == {AxisType.Auto} else None
