"""`Model.layers` of families whose layers are one Linen block each."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.attention_mask import AttentionMask, attention_mask, causal_mask
from rlhf_jax.models.cache import Cache, fill, is_empty, visible_in_cache, within_window
from rlhf_jax.models.interface import SharedPrompt
from rlhf_jax.models.remat import rematerialized
from rlhf_jax.models.stack import UnstackedLayers, depth, run_layers
from rlhf_jax.parallel.constraints import all_gather, constrain_cache
from rlhf_jax.parallel.partition import Rules

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines f32[B, L, d / 2]


class LayerKinds(NamedTuple):
    """Where layers differ without a parameter; read by the scan over them.

    Attributes:
      is_sliding: bool[N], whether a layer attends within a window.
      rotation: i32[N], which of the rotations of its positions a layer applies.
    """

    is_sliding: np.ndarray
    rotation: np.ndarray


class Context(NamedTuple):
    """Inputs that all layers share.

    Attributes:
      rotations: cosines and sines f32[R, B, L, d / 2] of R kinds; None without.
      kinds: of the layers of the stack; None where all are the same.
      window: of the sliding layers; None where there are none.
    """

    rotations: Rotation | None = None
    kinds: LayerKinds | None = None
    window: int | None = None


class Block(Protocol):
    """A layer as a Linen module.

    In decoding, `decode` is True and the methods `heads` and `attend` are called in turn.
    """

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`."""
        ...

    def clone(self, *, decode: bool) -> Any:
        """As `flax.linen.Module.clone`."""
        ...

    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask,
        rotation: Rotation | None,
        past: tuple[jax.Array, jax.Array] | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """([B, S, D], (keys, values) [B, Hk, S, d]) of [B, S, D] and the keys of a prefix."""
        ...

    def heads(
        self, x: jax.Array, rotation: Rotation | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scaled queries [B, H, L, d], and keys and values [B, Hk, L, d], of [B, L, D]."""
        ...

    def attend(
        self, x: jax.Array, q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
    ) -> jax.Array:
        """The rest of the block [B, L, D], of queries on a cache [B, Hk, C, d]."""
        ...


def apply_layers(
    block: Block,
    stack: Any,
    x: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
    prefix: Cache | None,
    shared: SharedPrompt | None,
    dropout_key: jax.Array | None,
    context: Context,
    *,
    dtype: str,
    rules: Rules,
    remat: str,
) -> tuple[jax.Array, Cache | None]:
    """Runs a stack of blocks. The arguments and the result are those of `Model.layers`.

    Args:
      block: the module of one layer, with `decode` False.
      context: of the stack; its rotations are of `positions`.
      dtype: the compute dtype.
      rules: `Model.partition_rules`.
      remat: as in `models/remat.py`.

    Raises:
      ValueError: two of cache, prefix and shared prompt, or dropout with one of them.
    """
    if sum(x is not None for x in (cache, prefix, shared)) > 1 or (
        dropout_key is not None and (cache, prefix, shared) != (None, None, None)
    ):
        raise ValueError(
            "layers takes a cache, a prefix or a shared prompt, one of the three, and no "
            "dropout with any of them."
        )
    if cache is not None and not is_empty(cache):
        return _decode(block.clone(decode=True), stack, x, mask, context, cache)
    shape = x.shape
    if prefix is not None:  # [G, K * T, D]
        x = x.reshape(prefix.mask.shape[0], -1, shape[-1])
        context = context._replace(
            rotations=jax.tree.map(
                lambda part: part.reshape(-1, *x.shape[:2], part.shape[-1]), context.rotations
            )
        )
    masks = [
        attention_mask(mask, positions, prefix, shared, window)
        for window in ([None] if context.window is None else [None, context.window])
    ]

    def body(x, layer):
        params, past, key, kind = layer
        visible, rotation = _of_kind(kind, masks), _rotation_of(kind, context)
        params = all_gather(params, dtype, rules, is_layer=True)
        rngs = {} if key is None else {"dropout": key}
        x, memory = block.apply(
            {"params": params}, x, visible, rotation, past, key is None, rngs=rngs
        )
        return x, memory if cache is not None else None

    past = None if prefix is None else (prefix.keys, prefix.values)
    keys = None if dropout_key is None else jax.random.split(dropout_key, depth(stack))
    x, memory = run_layers(rematerialized(body, remat), x, stack, (past, keys, context.kinds))
    return x.reshape(shape), None if cache is None else fill(cache, memory, mask)


def _of_kind(kind, parts):
    """Of [full] or [full, sliding] parts that of a layer of one kind."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda full, near: jnp.where(kind.is_sliding, near, full), *parts)


def _rotation_of(kind, context):
    index = 0 if kind is None else kind.rotation
    return jax.tree.map(lambda part: part[index], context.rotations)


def _decode(block, stack, x, mask, context, cache) -> tuple[jax.Array, Cache]:
    """Writes L tokens into the cache and attends to it, layer by layer."""
    visible, new_mask = visible_in_cache(cache, causal_mask(mask), mask)
    masks = [visible]
    if context.window is not None:
        masks.append(within_window(cache, visible, context.window))
    decode = _decode_unstacked if isinstance(stack, UnstackedLayers) else _decode_stacked
    x, keys, values = decode(block, stack, x, context, cache, masks)
    return x, Cache(keys, values, new_mask, cache.length + x.shape[1])


def _decode_stacked(block, stack, x, context, cache, masks):
    def body(carry, layer):
        x, keys, values, i = carry
        params, kind = {"params": layer[0]}, layer[1]
        q, *new = block.apply(params, x, _rotation_of(kind, context), method="heads")
        # Written first and then read: XLA copies a cache that is read and then written.
        keys, values = (
            jax.lax.dynamic_update_slice(memory, part[None], (i, 0, 0, cache.length, 0))
            for memory, part in zip((keys, values), new, strict=True)
        )
        past = (jax.lax.dynamic_index_in_dim(m, i, keepdims=False) for m in (keys, values))
        x = block.apply(params, x, q, *past, _of_kind(kind, masks), method="attend")
        return (x, keys, values, i + 1), None

    past = (constrain_cache(cache.keys), constrain_cache(cache.values))
    (x, keys, values, _), _ = jax.lax.scan(body, (x, *past, 0), (stack, context.kinds))
    return x, keys, values


def _decode_unstacked(block, stack, x, context, cache, masks):
    at, keys, values = (0, 0, cache.length, 0), [], []
    for i, (params, *past) in enumerate(zip(stack.layers, cache.keys, cache.values, strict=True)):
        kind = jax.tree.map(lambda leaf, i=i: leaf[i], context.kinds)
        rotation = _rotation_of(kind, context)
        q, *new = block.apply({"params": params}, x, rotation, method="heads")
        past = [
            jax.lax.dynamic_update_slice(memory, part, at)
            for memory, part in zip(past, new, strict=True)
        ]
        visible = _of_kind(kind, masks)
        x = block.apply({"params": params}, x, q, *past, visible, method="attend")
        keys.append(past[0])
        values.append(past[1])
    return x, tuple(keys), tuple(values)
