"""Stacked layers: scanned, split in halves, and unstacked for decoding on one CPU."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.backend import is_on_one_cpu
from rlhf_jax.errors import InputError

# Each layer that is not part of a stack is compiled by itself.
MAX_UNSTACKED_LAYERS = 16


class UnstackedLayers(NamedTuple):
    """Layers that do not form a stack."""

    layers: tuple[Any, ...]


def depth(stack: Any) -> int:
    """The number of layers of a stack."""
    if isinstance(stack, UnstackedLayers):
        return len(stack.layers)
    return jax.tree.leaves(stack)[0].shape[0]


def run_layers(body: Any, x: jax.Array, stack: Any, others: Any) -> tuple[jax.Array, Any]:
    """`jax.lax.scan` of body(x, (layer, *others)) over a stack, or a loop over `UnstackedLayers`.

    The loop returns each output of the body as a tuple instead of a stacked array.
    """
    if not isinstance(stack, UnstackedLayers):
        return jax.lax.scan(body, x, (stack, *others))
    outputs = []
    for i, layer in enumerate(stack.layers):
        x, output = body(x, (layer, *jax.tree.map(lambda leaf, i=i: leaf[i], others)))
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: leaves, *outputs)


def split_stack(stack: Any, num_layers_unfrozen: int) -> tuple[Any, Any]:
    """(lower, upper): the upper `num_layers_unfrozen` layers and those below them.

    Raises:
      InputError: the number is not from 0 to the number of layers.
    """
    layers = depth(stack)
    if not 0 <= num_layers_unfrozen <= layers:
        raise InputError(
            f"num_layers_unfrozen must be from 0 to n_layer = {layers}, "
            f"but is {num_layers_unfrozen}."
        )
    cut = layers - num_layers_unfrozen
    return jax.tree.map(lambda p: p[:cut], stack), jax.tree.map(lambda p: p[cut:], stack)


def merge_stack(lower: Any, upper: Any) -> Any:
    """The stack whose halves `split_stack` returned."""
    return jax.tree.map(lambda *halves: jnp.concatenate(halves), lower, upper)


def unstack_for_decoding(stack: Any) -> Any:
    """`UnstackedLayers` on one CPU, for at most 16 layers; else the stack.

    A CPU copies each layer out of a stack before it multiplies with it, which for a small batch
    takes as long as the product.
    """
    count = depth(stack)
    if not is_on_one_cpu() or count > MAX_UNSTACKED_LAYERS:
        return stack
    layers = (jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(count))
    return UnstackedLayers(tuple(layers))


def cast(params: Any, dtype: str, is_kept: Callable[[str], bool]) -> Any:
    """Parameters in the compute dtype, except those whose path (`layers/ln_1/scale`) is kept."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf if is_kept(name) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(of, params)


def multiplied_parameters(params: Any, pattern: str) -> int:
    """The number of parameters whose paths end with a pattern, in any tree of parameters."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if re.search(rf"(^|/)({pattern})$", name):
            total += int(leaf.size)
    return total
