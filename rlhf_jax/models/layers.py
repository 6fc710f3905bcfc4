"""Stacks of layers: scanned, unstacked for decoding on one CPU, and rematerialized."""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.attention import ATTENDED
from rlhf_jax.models.attention_mask import AttentionMask
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.cudnn_attention import FORWARD
from rlhf_jax.models.dense import ADAPTED
from rlhf_jax.models.settings import Remat
from rlhf_jax.parallel.constraints import (
    constrain_batch,
    constrain_batch_over_data,
    constrain_cache,
    remat_all_gather,
)

MAX_UNSTACKED_LAYERS = 48  # each is compiled by itself


class UnstackedLayers(NamedTuple):
    """The layers of a stack as separate trees."""

    layers: tuple[Any, ...]


Rotation = tuple[jax.Array, jax.Array]  # cosines and sines f32[B, L, d / 2]


class LayerKinds(NamedTuple):
    """Where the layers of a stack differ without a parameter; the scan reads it beside them.

    Attributes:
      is_sliding: bool[N], whether a layer attends within the window.
      rotation: i32[N], which of the rotations a layer applies.
    """

    is_sliding: np.ndarray
    rotation: np.ndarray


class Context(NamedTuple):
    """Inputs that the layers of a stack share.

    Attributes:
      rotations: cosines and sines f32[R, B, L, d / 2] of R kinds; None without.
      kinds: of the layers; None where all are the same.
      window: of the sliding layers; None where there are none.
    """

    rotations: Rotation | None = None
    kinds: LayerKinds | None = None
    window: int | None = None

    def rotation(self, kind: Any) -> Rotation | None:
        """The rotation of a layer of one kind."""
        index = 0 if kind is None else kind.rotation
        return jax.tree.map(lambda part: part[index], self.rotations)


class Block(Protocol):
    """A layer as a Linen module; in decoding, with `decode` True, by `heads`, `attend` and `rest`.

    `rotation` is `Context.rotation`, which a family without rotary positions does not read.
    """

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...

    def clone(self, *, decode: bool) -> Any: ...

    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask,
        rotation: Any,
        past: tuple[jax.Array, jax.Array] | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """([B, S, D], (keys, values) [B, Hk, S, d]) of [B, S, D] and the keys of a prefix."""
        ...

    def heads(self, x: jax.Array, rotation: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scaled queries [B, H, L, d], and keys and values [B, Hk, L, d], of [B, L, D]."""
        ...

    def attend(
        self, q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
    ) -> jax.Array:
        """Attention [B, H, L, d] of queries on a cache [B, Hk, C, d] visible as bool[B, L, C]."""
        ...

    def rest(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The result of the block [B, L, D], of its input and of attention."""
        ...


def depth(stack: Any) -> int:
    """The number of layers."""
    if isinstance(stack, UnstackedLayers):
        return len(stack.layers)
    return jax.tree.leaves(stack)[0].shape[0]


def merged_heads(out: jax.Array, *, decode: bool) -> jax.Array:
    """[B, S, H * d] of [B, H, S, d], heads over `tensor`; `decode` as in `Model.embed`."""
    out = jnp.swapaxes(out, 1, 2)
    out = constrain_batch(out.reshape(*out.shape[:2], -1), last="tensor")
    return constrain_batch_over_data(out, last="tensor") if decode else out


def layer_at(stack: Any, index: int) -> Any:
    """One layer of a stack, or of arrays beside it."""
    return jax.tree.map(lambda leaf: leaf[index], stack)


def of_kind(kind: Any, parts: list[Any]) -> Any:
    """Of [full] or [full, sliding] parts that of a layer of one kind."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda full, near: jnp.where(kind.is_sliding, near, full), *parts)


def memory_of_layers(
    cache: Cache, kinds: LayerKinds | None, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """i32[N] each: which of `Cache.memories` a layer has, and its index there."""
    which = np.zeros(count, np.int32)
    if cache.sliding_keys is not None:
        assert kinds is not None  # there are no sliding layers without
        which = kinds.is_sliding.astype(np.int32)
    return which, np.where(which, np.cumsum(which), np.cumsum(1 - which)).astype(np.int32) - 1


def run_layers(body: Any, x: jax.Array, stack: Any, others: Any) -> tuple[jax.Array, Any]:
    """`jax.lax.scan` of body(x, (layer, *others)) over a stack, or a loop over `UnstackedLayers`.

    The loop returns each output of the body as a tuple instead of a stacked array.
    """
    if not isinstance(stack, UnstackedLayers):
        return jax.lax.scan(body, x, (stack, *others))
    outputs = []
    for i, layer in enumerate(stack.layers):
        x, output = body(x, (layer, *layer_at(others, i)))
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: leaves, *outputs)


def decode_stacked(block, stack, x, context, cache, places):
    """(x [B, L, D], `Cache.memories`) after a scan over a stack and the cache of its layers.

    Args:
      places: (slot, visible) for each of the memories: where the new tokens are written, and
        the positions bool[B, L, C] that they see.
    """
    which, index = memory_of_layers(cache, context.kinds, depth(stack))
    used, branch = np.unique(which, return_inverse=True)
    if not used.size:
        return x, cache.memories
    places = [places[i] for i in used]

    def body(carry, layer):
        x, memories = carry
        params, kind, branch, index = layer
        params = {"params": params}
        q, *new = block.apply(params, x, context.rotation(kind), method="heads")
        # Written first and then read: XLA copies a cache that is read and then written, and one
        # that is written in a branch.
        memories = [
            tuple(
                _written(stack, part, (index, 0, 0, slot, 0), len(used) == 1 or branch == i)
                for stack, part in zip(memory, new, strict=True)
            )
            for i, (memory, (slot, _)) in enumerate(zip(memories, places, strict=True))
        ]
        branches = [
            functools.partial(_attend_in_stack, block, q, memory, index, visible)
            for memory, (_, visible) in zip(memories, places, strict=True)
        ]
        out = jax.lax.switch(branch, branches)
        return (block.apply(params, x, out, method="rest"), memories), None

    memories = jax.tree.map(constrain_cache, [cache.memories[i] for i in used])
    layers = (stack, context.kinds, branch, index)
    (x, memories), _ = jax.lax.scan(body, (x, memories), layers)
    merged = list(cache.memories)
    for i, memory in zip(used, memories, strict=True):
        merged[i] = memory
    return x, tuple(merged)


def _written(stack, part, at, where):
    """The stack of layers with a part [B, H, L, d] at an index, where a bool is True."""
    part = part[None]
    if where is not True:
        part = jnp.where(where, part, jax.lax.dynamic_slice(stack, at, part.shape))
    return jax.lax.dynamic_update_slice(stack, part, at)


def _attend_in_stack(block, q, memory, index, visible):
    """Attention [B, H, L, d] to one layer of the stacks (keys, values)."""
    past = (jax.lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in memory)
    return block.apply({}, q, *past, visible, method="attend")


def decode_unstacked(block, stack, x, context, cache, places):
    """As `decode_stacked`, of `UnstackedLayers`, whose keys and values are tuples."""
    memories: list[Any] = [([], []) for _ in cache.memories]
    layers = zip(stack.layers, *memory_of_layers(cache, context.kinds, depth(stack)), strict=True)
    for i, (params, which, index) in enumerate(layers):
        kind, (slot, visible) = layer_at(context.kinds, i), places[which]
        q, *new = block.apply({"params": params}, x, context.rotation(kind), method="heads")
        past = [
            jax.lax.dynamic_update_slice(memory[index], part, (0, 0, slot, 0))
            for memory, part in zip(cache.memories[which], new, strict=True)
        ]
        out = block.apply({}, q, *past, visible, method="attend")
        x = block.apply({"params": params}, x, out, method="rest")
        for parts, part in zip(memories[which], past, strict=True):
            parts.append(part)
    return x, tuple((tuple(keys), tuple(values)) for keys, values in memories)


def _is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether it is cuDNN's attention, whose outputs cannot be named with `checkpoint_name`."""
    return primitive.name == FORWARD


_POLICIES = {
    "full": None,
    # Products with parameters have no batch axes; those inside attention have.
    "dots": functools.reduce(
        jax.checkpoint_policies.save_from_both_policies,
        (
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(ATTENDED, ADAPTED),
            _is_cudnn,
        ),
    ),
}


def rematerialized(body: Any, remat: Remat) -> Any:
    """The body of a scan over layers, whose backward pass computes some values again.

    Args:
      body: (carry, layer) -> (carry, output).
      remat: "none" saves everything except parameters gathered from other devices; "full" the
        carry alone, so that the layer is computed again; "dots" also the products with parameters,
        with those of adapters added to them, and the outputs of attention, so that norms and
        activations are computed again. Values and gradients are the same.

    Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174).
    """
    if remat == "none":
        return remat_all_gather(body)
    # In a scan the compiler cannot merge the two computations, which is what CSE would do.
    return jax.checkpoint(body, prevent_cse=False, policy=_POLICIES[remat])
