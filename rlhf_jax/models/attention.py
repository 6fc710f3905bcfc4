"""Attention whose backward pass makes the weights anew instead of keeping them.

    out_t = sum_m w_tm v_m,     w_tm = exp(q_t . k_m - log Z_t),     Z_t = sum_m exp(q_t . k_m)

over the m that t sees. What is kept is `out` and `log Z`, [L, d] and [L] for each head; the
weights, [L, M], are computed twice (Dao et al. 2022, FlashAttention, algorithm 4;
arXiv:2205.14135). Queries go in blocks of rows, each of which meets only the keys up to its last
row: most of what a causal mask hides is not computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.backend import is_on_cpu
from rlhf_jax.models.dropout import Dropout, kept

BLOCK = 256
ATTENDED = "attended"
_LEAST = float(jnp.finfo(jnp.float32).min)


class Past(NamedTuple):
    """What stands before all responses of a group, and is seen by each of their tokens.

    Attributes:
      keys, values: [G, H, P, d].
      mask: bool[G, P], True on real tokens.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    past: Past | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Attention of K rows of T tokens in each of G groups, to themselves and to what went before.

    Args:
      q, k, v: [G, K, H, T, d]; q is scaled already.
      visible: bool[G, K, T, T], whether token t sees token m of its row; never one behind it.
      past: of each group, seen by all its rows.
      dropout: of the weights [G, K, H, T, T], without a past only.

    Returns:
      [G, K, H, T, d] in the dtype of q; 0 where a token sees nothing.
    """
    if dropout is not None and past is not None:
        raise ValueError("attention to a past has no dropout.")
    return _attend(q, k, v, visible, past, dropout)


def attend_to_cache(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
) -> jax.Array:
    """[B, H, L, d] of queries [B, H, L, d] on a cache [B, H, C, d], seen as bool[B, L, C] says."""
    logits = _product("bhld,bhcd->bhlc", q, keys)
    logits = jnp.where(visible[:, None], logits, _LEAST)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("bhlc,bhcd->bhld", weights, values)


@jax.custom_vjp
def _attend(q, k, v, visible, past, dropout):
    return _forward(q, k, v, visible, past, dropout)[0]


def _forward(q, k, v, visible, past, dropout):
    blocks = [
        _block_forward(q[..., rows, :], k, v, rows, visible, past, dropout)
        for rows in _blocks(q.shape[-2])
    ]
    out, log_total = (jnp.concatenate(parts, axis=3) for parts in zip(*blocks, strict=True))
    # Named, so that rematerialization may keep them and compute no weights a third time.
    out, log_total = (checkpoint_name(x, ATTENDED) for x in (out, log_total))
    return out, (q, k, v, visible, past, dropout, out, log_total)


def _block_forward(q, k, v, rows, visible, past, dropout):
    """(out [G, K, H, t, d], log_total f32[G, K, H, t, 1]) of the queries of some rows."""
    k, v = k[..., : rows.stop, :], v[..., : rows.stop, :]
    own_visible = visible[:, :, None, rows, : rows.stop]
    own = jnp.where(own_visible, _product("gkhtd,gkhmd->gkhtm", q, k), _LEAST)
    top = jnp.max(own, axis=-1, keepdims=True)
    if past is not None:
        seen, count = past.mask[:, None, None], q.shape[1]
        before = jnp.where(seen, _product("ghtd,ghmd->ghtm", _grouped(q), past.keys), _LEAST)
        top = jnp.maximum(top, _apart(jnp.max(before, axis=-1, keepdims=True), count))
    weights = jnp.where(own_visible, jnp.exp(own - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if dropout is not None:
        weights = _dropped(dropout, weights, rows)
    out = _product("gkhtm,gkhmd->gkhtd", weights.astype(v.dtype), v)
    if past is not None:
        weights = jnp.where(seen, jnp.exp(before - _grouped(top)), 0.0)
        total += _apart(jnp.sum(weights, axis=-1, keepdims=True), count)
        found = _product("ghtm,ghmd->ghtd", weights.astype(v.dtype), past.values)
        out += _apart(found, count)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return (out / total).astype(q.dtype), top + jnp.log(total)


def _backward(saved, gradient):
    q, k, v, visible, past, dropout, out, log_total = saved
    # sum_m w_tm dw_tm, which the softmax takes off every gradient of a row.
    mean = jnp.sum(_wide(gradient) * _wide(out), axis=-1, keepdims=True)
    parts, for_past = [], None
    for_k, for_v = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for rows in _blocks(q.shape[-2]):
        given = tuple(x[..., rows, :] for x in (q, gradient, mean, log_total))
        block_q, block_k, block_v = _block_backward(given, k, v, rows, visible, dropout)
        missing = [(0, 0)] * 3 + [(0, k.shape[-2] - rows.stop), (0, 0)]
        for_k, for_v = for_k + jnp.pad(block_k, missing), for_v + jnp.pad(block_v, missing)
        parts.append(block_q)
    for_q = jnp.concatenate(parts, axis=3)
    if past is not None:
        before_q, for_past = _past_backward(q, gradient, mean, log_total, past)
        for_q += before_q
    dtype = q.dtype
    return for_q.astype(dtype), for_k.astype(dtype), for_v.astype(dtype), None, for_past, None


def _block_backward(given, k, v, rows, visible, dropout):
    """Gradients for q, k and v, in float32, of the queries of some rows."""
    q, gradient, mean, log_total = given
    k, v = k[..., : rows.stop, :], v[..., : rows.stop, :]
    own_visible = visible[:, :, None, rows, : rows.stop]
    logits = _product("gkhtd,gkhmd->gkhtm", q, k)
    weights = jnp.where(own_visible, jnp.exp(logits - log_total), 0.0)
    for_weights, read = _product("gkhtd,gkhmd->gkhtm", gradient, v), weights
    if dropout is not None:
        for_weights = _dropped(dropout, for_weights, rows)
        read = _dropped(dropout, weights, rows)
    for_logits = (weights * (for_weights - mean)).astype(q.dtype)
    return (
        _product("gkhtm,gkhmd->gkhtd", for_logits, k),
        _product("gkhtm,gkhtd->gkhmd", for_logits, q),
        _product("gkhtm,gkhtd->gkhmd", read.astype(q.dtype), gradient),
    )


def _past_backward(q, gradient, mean, log_total, past):
    """(gradient for q, gradients for the past), summed over the rows of each group."""
    count = q.shape[1]
    q, gradient, mean, log_total = (_grouped(x) for x in (q, gradient, mean, log_total))
    logits = _product("ghtd,ghmd->ghtm", q, past.keys)
    weights = jnp.where(past.mask[:, None, None], jnp.exp(logits - log_total), 0.0)
    for_weights = _product("ghtd,ghmd->ghtm", gradient, past.values)
    for_logits = (weights * (for_weights - mean)).astype(q.dtype)
    for_keys = _product("ghtm,ghtd->ghmd", for_logits, q).astype(q.dtype)
    for_values = _product("ghtm,ghtd->ghmd", weights.astype(q.dtype), gradient).astype(q.dtype)
    for_q = _product("ghtm,ghmd->ghtd", for_logits, past.keys)
    # The mask has no gradient, and custom rules say so by None.
    return _apart(for_q, count), Past(for_keys, for_values, None)  # type: ignore[arg-type]


_attend.defvjp(_forward, _backward)


def _dropped(dropout, weights, rows):
    keep = kept(dropout, weights.shape, rows.start)
    return jnp.where(keep, weights * dropout.scale, 0.0)


def _blocks(length: int) -> list[slice]:
    """Runs of rows, as equal as they can be, of at most `BLOCK`."""
    count = -(-length // BLOCK)
    ends = [length * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


def _grouped(x):
    """[G, H, K * T, .] of [G, K, H, T, .]: all that meet the same past, in one product."""
    groups, count, heads, length, width = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(groups, heads, count * length, width)


def _apart(x, count):
    """[G, K, H, T, .] of [G, H, K * T, .]."""
    groups, heads, _, width = x.shape
    return jnp.swapaxes(x.reshape(groups, heads, count, -1, width), 1, 2)


def _product(axes, x, y):
    """The product in float32; on a CPU of operands in it: few of others are there, all slow."""
    if is_on_cpu():
        x, y = _wide(x), _wide(y)
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _wide(x):
    return x.astype(jnp.float32)
