"""`Model.layers` of families whose layers are one Linen block each."""

from typing import Any, Protocol

import jax

from rlhf_jax.models.attention_mask import AttentionMask, attention_mask, causal_mask
from rlhf_jax.models.cache import Cache, fill, is_empty, visible_in_cache
from rlhf_jax.models.interface import SharedPrompt
from rlhf_jax.models.remat import rematerialized
from rlhf_jax.models.stack import UnstackedLayers, depth, run_layers
from rlhf_jax.parallel.constraints import all_gather, constrain_cache
from rlhf_jax.parallel.partition import Rules


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
        positions: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """([B, S, D], (keys, values) [B, Hk, S, d]) of [B, S, D] and the keys of a prefix."""
        ...

    def heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
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
    *,
    dtype: str,
    rules: Rules,
    remat: str,
) -> tuple[jax.Array, Cache | None]:
    """Runs a stack of blocks. The arguments and the result are those of `Model.layers`.

    Args:
      block: the module of one layer, with `decode` False.
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
        return _decode(block.clone(decode=True), stack, x, mask, positions, cache)
    shape = x.shape
    if prefix is not None:  # [G, K * T, D]
        x = x.reshape(prefix.mask.shape[0], -1, shape[-1])
    positions = positions.reshape(x.shape[:2])
    visible = attention_mask(mask, prefix, shared)

    def body(x, layer):
        params, past, key = layer
        params = all_gather(params, dtype, rules, is_layer=True)
        rngs = {} if key is None else {"dropout": key}
        x, memory = block.apply(
            {"params": params}, x, visible, positions, past, key is None, rngs=rngs
        )
        return x, memory if cache is not None else None

    past = None if prefix is None else (prefix.keys, prefix.values)
    keys = None if dropout_key is None else jax.random.split(dropout_key, depth(stack))
    x, memory = run_layers(rematerialized(body, remat), x, stack, (past, keys))
    return x.reshape(shape), None if cache is None else fill(cache, memory, mask)


def _decode(block, stack, x, mask, positions, cache) -> tuple[jax.Array, Cache]:
    """Writes L tokens into the cache and attends to it, layer by layer."""
    visible, new_mask = visible_in_cache(cache, causal_mask(mask), mask)
    decode = _decode_unstacked if isinstance(stack, UnstackedLayers) else _decode_stacked
    x, keys, values = decode(block, stack, x, positions, cache, visible)
    return x, Cache(keys, values, new_mask, cache.length + x.shape[1])


def _decode_stacked(block, stack, x, positions, cache, visible):
    def body(carry, params):
        x, keys, values, i = carry
        params = {"params": params}
        q, *new = block.apply(params, x, positions, method="heads")
        # Written first and then read: XLA copies a cache that is read and then written.
        keys, values = (
            jax.lax.dynamic_update_slice(memory, part[None], (i, 0, 0, cache.length, 0))
            for memory, part in zip((keys, values), new, strict=True)
        )
        past = (jax.lax.dynamic_index_in_dim(m, i, keepdims=False) for m in (keys, values))
        x = block.apply(params, x, q, *past, visible, method="attend")
        return (x, keys, values, i + 1), None

    past = (constrain_cache(cache.keys), constrain_cache(cache.values))
    (x, keys, values, _), _ = jax.lax.scan(body, (x, *past, 0), stack)
    return x, keys, values


def _decode_unstacked(block, stack, x, positions, cache, visible):
    at, keys, values = (0, 0, cache.length, 0), [], []
    for params, *past in zip(stack.layers, cache.keys, cache.values, strict=True):
        q, *new = block.apply({"params": params}, x, positions, method="heads")
        past = [
            jax.lax.dynamic_update_slice(memory, part, at)
            for memory, part in zip(past, new, strict=True)
        ]
        x = block.apply({"params": params}, x, q, *past, visible, method="attend")
        keys.append(past[0])
        values.append(past[1])
    return x, tuple(keys), tuple(values)
