"""How GPT-2's parameters and caches lie in memory while responses are sampled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.backend import is_on_one_cpu
from rlhf_jax.models.interface import Cache, Params

# Each one is compiled by itself.
MAX_UNSTACKED_LAYERS = 16


class UnstackedLayers(NamedTuple):
    """Layers that are no stack."""

    layers: tuple[Params, ...]


def for_decoding(params: Params, dtype: str) -> Params:
    """Parameters in the compute dtype; on one CPU also in the order in which decoding reads them.

    A CPU copies each layer out of a stack before it multiplies with it, which for a few rows takes
    as long as the product: up to 16 layers stand one by one. And it reads the embedding faster as
    columns, [D, Vp], where few rows are multiplied with all of it. Parameters that are in this
    order already are given back as they are.
    """
    if "columns" in params["wte"]:
        return params
    params = _cast(params, dtype)
    if not is_on_one_cpu():
        return params
    params = {**params, "wte": {"columns": params["wte"]["embedding"].T}}
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    if depth > MAX_UNSTACKED_LAYERS:
        return params
    layers = (jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(depth))
    return {**params, "layers": UnstackedLayers(tuple(layers))}


def check_trainable(params: Params) -> None:
    """Raises a ValueError if the parameters were laid out for decoding."""
    if "columns" in params["wte"]:
        raise ValueError("these parameters are laid out by for_decoding; give those of before.")


def _cast(params: Params, dtype: str) -> Params:
    """Parameters of products and embeddings in the compute dtype; layer norms as they are."""

    def of(path, leaf):
        is_norm = "ln_" in jax.tree_util.keystr(path)
        return leaf if is_norm else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(of, params)


def embedded(table: Params, ids: jax.Array) -> jax.Array:
    """[..., D] of i32[...]: rows of a table, or columns of one that lies so."""
    if "columns" in table:
        return jnp.moveaxis(jnp.take(table["columns"], ids, axis=1, mode="clip"), 0, -1)
    return jnp.take(table["embedding"], ids, axis=0, mode="clip")


def unembedded(table: Params, hidden: jax.Array) -> jax.Array:
    """f32[..., Vp]: products of [..., D] with all rows of the table."""
    axes, name = ("dv", "columns") if "columns" in table else ("vd", "embedding")
    return jnp.einsum(
        f"...d,{axes}->...v",
        hidden,
        table[name].astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def run_layers(body: Any, x: jax.Array, stack: Params, others: Any) -> tuple[jax.Array, Any]:
    """`jax.lax.scan` of body(x, (layer, *others)) over a stack, or a loop over layers one by one.

    Of the latter what `body` gives beside x is a tuple of each leaf, instead of a stack.
    """
    if not isinstance(stack, UnstackedLayers):
        return jax.lax.scan(body, x, (stack, *others))
    outputs = []
    for i, layer in enumerate(stack.layers):
        x, output = body(x, (layer, *jax.tree.map(lambda leaf, i=i: leaf[i], others)))
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: leaves, *outputs)


def decode_unstacked(
    block: Any, stack: UnstackedLayers, x: jax.Array, visible: jax.Array, cache: Cache
) -> tuple[jax.Array, tuple[Any, Any]]:
    """(x, (keys, values)): a step of decoding through layers and caches one by one.

    Args:
      block: a decoding `Block`.
      x: [B, L, D] of the new tokens.
      visible: bool[B, L, C], what they see of the cache with themselves in it.
      cache: [B, H, C, d] of each layer.
    """
    at, keys, values = (0, 0, cache.length, 0), [], []
    for params, *past in zip(stack.layers, cache.keys, cache.values, strict=True):
        q, *new = block.apply({"params": params}, x, method="heads")
        past = [
            jax.lax.dynamic_update_slice(whole, part, at)
            for whole, part in zip(past, new, strict=True)
        ]
        x = block.apply({"params": params}, x, q, *past, visible, method="decode")
        keys.append(past[0])
        values.append(past[1])
    return x, (tuple(keys), tuple(values))
