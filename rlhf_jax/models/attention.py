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

from rlhf_jax.backend import can_set_layouts, is_on_cpu, transposed_copy
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
    shape = q.shape
    q = q.reshape(*shape[:2], k.shape[2], -1, *shape[3:])
    return _attend(softcap, q, k, v, visible, past, dropout).reshape(shape)


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


# Below, q is [G, K, Hk, N, T, d]: the N query heads of one key/value head are further queries of
# it, so that no key is repeated and no gradient of a key is summed over copies. The backward pass
# holds weights as [..., m, n, t] instead of [..., n, t, m]: products that sum over queries then
# contract the last axes, which is faster on a CPU. That for q sums over m, and multiplies with
# transposed keys, which are smaller than the weights. Where N is 1, weights of a response to itself
# are [..., t, m], without the axis n: XLA would copy them for a sum over n and t.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(softcap, q, k, v, visible, past, dropout):
    return _forward(softcap, q, k, v, visible, past, dropout)[0]


def _forward(softcap, q, k, v, visible, past, dropout):
    blocks = [
        _block_forward(softcap, q[..., block, :], k, v, block, visible, past, dropout)
        for block in _blocks(q.shape[-2])
    ]
    out, log_total = (jnp.concatenate(parts, axis=-2) for parts in zip(*blocks, strict=True))
    # Named, so that rematerialization may keep them and compute no weights a third time.
    out, log_total = (checkpoint_name(x, ATTENDED) for x in (out, log_total))
    return out, (q, k, v, visible, past, dropout, out, log_total)


def _block_forward(softcap, q, k, v, block, visible, past, dropout):
    """(out [G, K, Hk, N, t, d], log_total f32[G, K, Hk, N, t, 1]) of a block of t queries."""
    k, v = k[..., : block.stop, :], v[..., : block.stop, :]
    own_visible = visible[:, :, None, None, block, : block.stop]
    own = _capped(softcap, _product("gkhntd,gkhmd->gkhntm", q, k))
    own = jnp.where(own_visible, own, -jnp.inf)
    top = jnp.max(own, axis=-1, keepdims=True)
    if past is not None:
        seen = _seen(past.mask, block)
        before = _capped(softcap, _product("ghkntd,ghmd->ghkntm", _heads_first(q), past.keys))
        before = jnp.where(seen, before, -jnp.inf)
        top = jnp.maximum(top, _heads_first(jnp.max(before, axis=-1, keepdims=True)))
    top = jnp.maximum(top, _MIN)  # finite for a token that sees nothing: -inf - top is no NaN
    weights = jnp.exp(own - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if dropout is not None:
        weights = jnp.where(kept(dropout, weights.shape, block.start), weights * dropout.scale, 0.0)
    out = _product("gkhntm,gkhmd->gkhntd", weights.astype(v.dtype), v)
    if past is not None:
        weights = jnp.exp(before - _heads_first(top))
        total += _heads_first(jnp.sum(weights, axis=-1, keepdims=True))
        out += _heads_first(
            _product("ghkntm,ghmd->ghkntd", weights.astype(past.values.dtype), past.values)
        )
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
    for_q = jnp.concatenate(parts, axis=-2)
    if past is not None:
        before_q, for_past = _past_backward(softcap, q, gradient, mean, log_total, past)
        for_q += before_q
    dtype = q.dtype
    return for_q.astype(dtype), for_k.astype(dtype), for_v.astype(dtype), None, for_past, None


def _block_backward(softcap, queries, k, v, block, visible, dropout):
    """Gradients for q, k and v, in float32, from a block of queries."""
    q, gradient, mean, log_total = queries
    k, v = k[..., : block.stop, :], v[..., : block.stop, :]
    own_visible = visible[:, :, None, None, block, : block.stop]
    shape, is_single = (*q.shape[:-1], k.shape[-2]), q.shape[3] == 1
    if is_single:
        of_q, of_weights, arranged = "gkhtd", "gkhtm", _without_heads
        q, gradient = _without_heads(q), _without_heads(gradient)
    else:
        of_q, of_weights, arranged = "gkhntd", "gkhmnt", _keys_before_heads
    mean, log_total, own_visible = arranged(mean), arranged(log_total), arranged(own_visible)
    logits = _capped(softcap, _product(f"gkhmd,{of_q}->{of_weights}", k, q))
    weights = jnp.exp(jnp.where(own_visible, logits, -jnp.inf) - log_total)
    for_weights, read = _product(f"gkhmd,{of_q}->{of_weights}", v, gradient), weights
    if dropout is not None:
        scale = dropout.scale * arranged(kept(dropout, shape, block.start))
        for_weights, read = for_weights * scale, weights * scale
    for_logits = weights * (for_weights - mean) * _slope(softcap, logits)
    for_logits = for_logits.astype(q.dtype)
    for_k = _product(f"{of_weights},{of_q}->gkhmd", for_logits, q)
    for_v = _product(f"{of_weights},{of_q}->gkhmd", read.astype(q.dtype), gradient)
    if is_single:
        for_q = _product("gkhtm,gkhmd->gkhtd", for_logits, k)[:, :, :, None]
    else:
        for_q = _product("gkhdm,gkhmnt->gkhdnt", _transposed(k), for_logits)
        for_q = jnp.moveaxis(for_q, 3, -1)
    return for_q, for_k, for_v


def _past_backward(softcap, q, gradient, mean, log_total, past):
    """(gradient for q, gradients for the past), summed over the responses of each group."""
    seen = jnp.moveaxis(_seen(past.mask, slice(None)), -1, 2)
    q, gradient = _heads_first(q), _heads_first(gradient)
    mean, log_total = (jnp.moveaxis(_heads_first(x), -1, 2) for x in (mean, log_total))
    logits = _capped(softcap, _product("ghmd,ghkntd->ghmknt", past.keys, q))
    weights = jnp.exp(jnp.where(seen, logits, -jnp.inf) - log_total)
    for_weights = _product("ghmd,ghkntd->ghmknt", past.values, gradient)
    for_logits = weights * (for_weights - mean) * _slope(softcap, logits)
    for_logits = for_logits.astype(q.dtype)
    for_keys = _product("ghmknt,ghkntd->ghmd", for_logits, q).astype(q.dtype)
    weights = weights.astype(q.dtype)
    for_values = _product("ghmknt,ghkntd->ghmd", weights, gradient).astype(q.dtype)
    for_q = jnp.moveaxis(_product("ghdm,ghmknt->ghdknt", _transposed(past.keys), for_logits), 2, -1)
    # The mask has no gradient, which custom rules express by None.
    return _heads_first(for_q), Past(for_keys, for_values, None)  # type: ignore[arg-type]


_attend.defvjp(_forward, _backward)


def _capped(softcap, logits):
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _slope(softcap, capped):
    """The derivative of `_capped`, from its result."""
    return 1.0 if softcap is None else 1.0 - jnp.square(capped / softcap)


def _seen(mask, block):
    """bool[G, 1, K or 1, 1, t or 1, P] of `Past.mask`, for a block of queries."""
    mask = mask if mask.shape[2] == 1 else mask[:, :, block]
    return mask[:, None, :, None]


def _blocks(length: int) -> list[slice]:
    """Blocks of positions, of nearly equal length, at most `BLOCK`."""
    count = -(-length // BLOCK)
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _heads_first(x):
    """[G, Hk, K, N, T, .] of [G, K, Hk, N, T, .], for products with a past; and back."""
    return jnp.swapaxes(x, 1, 2)


def _without_heads(x):
    """[G, K, Hk, T, .] of [G, K, Hk, 1, T, .]."""
    return jnp.squeeze(x, axis=3)


def _keys_before_heads(x):
    """[G, K, Hk, m, N, T] of [G, K, Hk, N, T, m]."""
    return jnp.moveaxis(x, -1, 3)


def _joined(x):
    """[G, H, K * T, d] of [G, K, H, T, d]."""
    groups, _, heads, _, width = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(groups, heads, -1, width)


def _split(x, count):
    """[G, K, H, T, d] of [G, H, K * T, d]."""
    groups, heads, _, width = x.shape
    return jnp.swapaxes(x.reshape(groups, heads, count, -1, width), 1, 2)


def _transposed(x):
    """[..., d, m] of [..., m, d]."""
    return transposed_copy(x) if can_set_layouts() else jnp.swapaxes(x, -1, -2)


def _product(axes, x, y):
    """The product in float32; on a CPU of float32 operands, since products of others are slow."""
    if is_on_cpu():
        x, y = _wide(x), _wide(y)
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _wide(x):
    return x.astype(jnp.float32)
