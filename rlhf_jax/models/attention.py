"""Attention whose backward pass computes the weights again instead of keeping them.

    out_t = sum_m w_tm v_m,     w_tm = exp(q_t . k_m - log Z_t),     Z_t = sum_m exp(q_t . k_m)

over the m that t sees. Only `out` and `log Z` are kept, [L, d] and [L] for each head; the weights,
[L, M], are computed twice (Dao et al. 2022, FlashAttention, algorithm 4; arXiv:2205.14135). Queries
are processed in blocks, each with the keys up to its last position: most products that a causal
mask hides are not computed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.backend import is_on_cpu
from rlhf_jax.models.attention_mask import AttentionMask, Past
from rlhf_jax.models.cudnn_attention import attend_by_cudnn
from rlhf_jax.models.dropout import Dropout, kept

BLOCK = 256
ATTENDED = "attended"
_MIN = float(jnp.finfo(jnp.float32).min)

Memory = tuple[jax.Array, jax.Array]  # keys and values


def self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    past: Memory | None = None,
    *,
    implementation: str = "blocks",
    softcap: float | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Attention of P tokens of a prompt and K responses of T tokens, S = P + K * T.

    Args:
      q: [B, H, S, d], scaled already.
      k, v: [B, Hk, S, d], Hk key/value heads; query head h reads head h // (H / Hk).
      mask: of `attention_mask`.
      past: keys and values [B, Hk, P, d] of a prefix, where `mask.past` is of one.
      implementation: "blocks", here, or "cudnn", as in `models/cudnn_attention.py`.
      softcap: as in `attend`; with "blocks" only.
      dropout: of the weights, for plain texts only.

    Returns:
      [B, H, S, d] in the dtype of q.
    """
    parts, length = [], 0
    if mask.prompt is not None:
        length = mask.prompt.shape[-1]
        past = k[:, :, :length], v[:, :, :length]
        own = tuple(x[:, None, :, :length] for x in (q, k, v))
        parts.append(_attend_by(implementation, softcap, own, mask.prompt[:, None]))
    seen = None
    if mask.past is not None:
        assert past is not None  # of the prompt above, or of a prefix
        seen = Past(past[0], past[1], mask.past)
    count = mask.own.shape[1]
    own = tuple(_split(x[:, :, length:], count) for x in (q, k, v))
    parts.append(_attend_by(implementation, softcap, own, mask.own, seen, dropout))
    return jnp.concatenate([_joined(part) for part in parts], axis=2)


def _attend_by(implementation, softcap, qkv, visible, past=None, dropout=None):
    q, k, v = qkv
    if implementation == "cudnn":
        return attend_by_cudnn(q, k, v, visible, past)
    return attend(q, k, v, visible, past, dropout, softcap=softcap)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    past: Past | None = None,
    dropout: Dropout | None = None,
    *,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of K responses of T tokens in each of G groups, to themselves and to a past.

    Args:
      q: [G, K, H, T, d], scaled already.
      k, v: [G, K, Hk, T, d]; query head h reads key/value head h // (H / Hk).
      visible: bool[G, K, T, T], whether token t sees token m of its response, m <= t.
      past: of each group, seen by all its responses.
      dropout: of the weights [G, K, H, T, T], without a past only.
      softcap: c, with which c * tanh(q . k / c) takes the place of q . k (Gemma Team 2024, Gemma 2,
        section 2; arXiv:2408.00118).

    Returns:
      [G, K, H, T, d] in the dtype of q; 0 where a token sees nothing.
    """
    if dropout is not None and past is not None:
        raise ValueError("attention to a past has no dropout.")
    heads = q.shape[2]
    k, v = _repeat_heads(k, heads, 2), _repeat_heads(v, heads, 2)
    if past is not None:
        keys, values = (_repeat_heads(x, heads, 1) for x in past[:2])
        past = Past(keys, values, past.mask)
    return _attend(softcap, q, k, v, visible, past, dropout)


def _repeat_heads(x, heads, axis):
    """The key/value heads, each repeated for its group of query heads."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)


def attend_to_cache(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: jax.Array,
    *,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of new tokens to a cache.

    Args:
      q: [B, H, L, d], scaled already.
      keys, values: [B, Hk, C, d]; query head h reads key/value head h // (H / Hk). They are not
        repeated: the heads of a group become further queries of one head.
      visible: bool[B, L, C], whether token l sees position c.

    Returns:
      [B, H, L, d].
    """
    shape, groups = q.shape, q.shape[1] // keys.shape[1]
    if groups > 1:
        q = q.reshape(shape[0], keys.shape[1], groups * shape[2], shape[3])
        visible = jnp.tile(visible, (1, groups, 1))
    logits = _capped(softcap, _product("bhld,bhcd->bhlc", q, keys))
    logits = jnp.where(visible[:, None], logits, _MIN)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("bhlc,bhcd->bhld", weights, values).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(softcap, q, k, v, visible, past, dropout):
    return _forward(softcap, q, k, v, visible, past, dropout)[0]


def _forward(softcap, q, k, v, visible, past, dropout):
    blocks = [
        _block_forward(softcap, q[..., block, :], k, v, block, visible, past, dropout)
        for block in _blocks(q.shape[-2])
    ]
    out, log_total = (jnp.concatenate(parts, axis=3) for parts in zip(*blocks, strict=True))
    # Named, so that rematerialization may keep them and compute no weights a third time.
    out, log_total = (checkpoint_name(x, ATTENDED) for x in (out, log_total))
    return out, (q, k, v, visible, past, dropout, out, log_total)


def _block_forward(softcap, q, k, v, block, visible, past, dropout):
    """(out [G, K, H, t, d], log_total f32[G, K, H, t, 1]) of a block of t queries."""
    k, v = k[..., : block.stop, :], v[..., : block.stop, :]
    own_visible = visible[:, :, None, block, : block.stop]
    own = _capped(softcap, _product("gkhtd,gkhmd->gkhtm", q, k))
    own = jnp.where(own_visible, own, _MIN)
    top = jnp.max(own, axis=-1, keepdims=True)
    if past is not None:
        seen, count = _seen(past.mask, block, q.shape), q.shape[1]
        before = _capped(softcap, _product("ghtd,ghmd->ghtm", _joined(q), past.keys))
        before = jnp.where(seen, before, _MIN)
        top = jnp.maximum(top, _split(jnp.max(before, axis=-1, keepdims=True), count))
    weights = jnp.where(own_visible, jnp.exp(own - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if dropout is not None:
        weights = _dropped(dropout, weights, block)
    out = _product("gkhtm,gkhmd->gkhtd", weights.astype(v.dtype), v)
    if past is not None:
        weights = jnp.where(seen, jnp.exp(before - _joined(top)), 0.0)
        total += _split(jnp.sum(weights, axis=-1, keepdims=True), count)
        attended = _product("ghtm,ghmd->ghtd", weights.astype(v.dtype), past.values)
        out += _split(attended, count)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return (out / total).astype(q.dtype), top + jnp.log(total)


def _backward(softcap, saved, gradient):
    q, k, v, visible, past, dropout, out, log_total = saved
    # sum_m w_tm dw_tm, which the gradient of the softmax subtracts for each t.
    mean = jnp.sum(_wide(gradient) * _wide(out), axis=-1, keepdims=True)
    parts, for_past = [], None
    for_k, for_v = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for block in _blocks(q.shape[-2]):
        queries = tuple(x[..., block, :] for x in (q, gradient, mean, log_total))
        block_q, block_k, block_v = _block_backward(softcap, queries, k, v, block, visible, dropout)
        missing = [(0, 0)] * 3 + [(0, k.shape[-2] - block.stop), (0, 0)]
        for_k, for_v = for_k + jnp.pad(block_k, missing), for_v + jnp.pad(block_v, missing)
        parts.append(block_q)
    for_q = jnp.concatenate(parts, axis=3)
    if past is not None:
        before_q, for_past = _past_backward(softcap, q, gradient, mean, log_total, past)
        for_q += before_q
    dtype = q.dtype
    return for_q.astype(dtype), for_k.astype(dtype), for_v.astype(dtype), None, for_past, None


def _block_backward(softcap, queries, k, v, block, visible, dropout):
    """Gradients for q, k and v, in float32, from a block of queries."""
    q, gradient, mean, log_total = queries
    k, v = k[..., : block.stop, :], v[..., : block.stop, :]
    own_visible = visible[:, :, None, block, : block.stop]
    logits = _capped(softcap, _product("gkhtd,gkhmd->gkhtm", q, k))
    weights = jnp.where(own_visible, jnp.exp(logits - log_total), 0.0)
    for_weights, read = _product("gkhtd,gkhmd->gkhtm", gradient, v), weights
    if dropout is not None:
        for_weights = _dropped(dropout, for_weights, block)
        read = _dropped(dropout, weights, block)
    for_logits = weights * (for_weights - mean) * _slope(softcap, logits)
    for_logits = for_logits.astype(q.dtype)
    return (
        _product("gkhtm,gkhmd->gkhtd", for_logits, k),
        _product("gkhtm,gkhtd->gkhmd", for_logits, q),
        _product("gkhtm,gkhtd->gkhmd", read.astype(q.dtype), gradient),
    )


def _past_backward(softcap, q, gradient, mean, log_total, past):
    """(gradient for q, gradients for the past), summed over the responses of each group."""
    count, seen = q.shape[1], _seen(past.mask, slice(None), q.shape)
    q, gradient, mean, log_total = (_joined(x) for x in (q, gradient, mean, log_total))
    logits = _capped(softcap, _product("ghtd,ghmd->ghtm", q, past.keys))
    weights = jnp.where(seen, jnp.exp(logits - log_total), 0.0)
    for_weights = _product("ghtd,ghmd->ghtm", gradient, past.values)
    for_logits = weights * (for_weights - mean) * _slope(softcap, logits)
    for_logits = for_logits.astype(q.dtype)
    for_keys = _product("ghtm,ghtd->ghmd", for_logits, q).astype(q.dtype)
    for_values = _product("ghtm,ghtd->ghmd", weights.astype(q.dtype), gradient).astype(q.dtype)
    for_q = _product("ghtm,ghmd->ghtd", for_logits, past.keys)
    # The mask has no gradient, which custom rules express by None.
    return _split(for_q, count), Past(for_keys, for_values, None)  # type: ignore[arg-type]


_attend.defvjp(_forward, _backward)


def _capped(softcap, logits):
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _slope(softcap, capped):
    """The derivative of `_capped`, from its result."""
    return 1.0 if softcap is None else 1.0 - jnp.square(capped / softcap)


def _seen(mask, block, shape):
    """bool[G, 1, K * T or 1, P] of `Past.mask`, for a block of the queries [G, K, H, t, d]."""
    if mask.shape[1:3] == (1, 1):
        return mask
    mask = mask[:, :, None, block]
    return _joined(jnp.broadcast_to(mask, (*shape[:2], *mask.shape[2:])))


def _dropped(dropout, weights, block):
    keep = kept(dropout, weights.shape, block.start)
    return jnp.where(keep, weights * dropout.scale, 0.0)


def _blocks(length: int) -> list[slice]:
    """Blocks of positions, of nearly equal length, at most `BLOCK`."""
    count = -(-length // BLOCK)
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _joined(x):
    """[G, H, K * T, .] of [G, K, H, T, .], for one product with the past of the group."""
    groups, _, heads, _, width = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(groups, heads, -1, width)


def _split(x, count):
    """[G, K, H, T, .] of [G, H, K * T, .]."""
    groups, heads, _, width = x.shape
    return jnp.swapaxes(x.reshape(groups, heads, count, -1, width), 1, 2)


def _product(axes, x, y):
    """The product in float32; on a CPU of float32 operands, since products of others are slow."""
    if is_on_cpu():
        x, y = _wide(x), _wide(y)
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _wide(x):
    return x.astype(jnp.float32)
