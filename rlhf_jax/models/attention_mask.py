"""Which tokens see which: texts, packed texts, and prompts with several responses.

With a window w, a token sees w positions, its own included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.models.cache import Cache
from rlhf_jax.models.interface import SharedPrompt, positions_from


class Past(NamedTuple):
    """Keys and values before all responses of a group, seen by each of their tokens.

    Attributes:
      keys, values: [G, Hk, P, d], Hk key/value heads.
      mask: bool[G, K or 1, T or 1, P], whether token t of response k sees position p.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array


class AttentionMask(NamedTuple):
    """Which tokens of [B, S] see which: P of a prompt, then K responses of T, S = P + K * T.

    Attributes:
      own: bool[B, K, T, T], tokens of each response among themselves.
      prompt: bool[B, P, P], tokens of the prompt among themselves; None where P is 0.
      past: bool[B, K or 1, T or 1, P], the tokens before the responses that each one sees: those of
        the prompt, or of a prefix whose keys and values are an argument; None where nothing is
        before them.
    """

    own: jax.Array
    prompt: jax.Array | None = None
    past: jax.Array | None = None


def causal_mask(mask: jax.Array, window: int | None = None) -> jax.Array:
    """bool[..., L, L]: whether token l sees token m: a real one of its segment, not after it.

    Args:
      mask: bool[..., L], or i32[..., L] segments, 0 on padding; real tokens of one segment are
        contiguous.
      window: None for all positions before.
    """
    segments = mask.astype(jnp.int32)
    same = (segments[..., :, None] == segments[..., None, :]) & (segments[..., None, :] > 0)
    index = jnp.arange(mask.shape[-1])
    distance = index[:, None] - index[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return same & near


def attention_mask(
    mask: jax.Array,
    prefix: Cache | None = None,
    shared: SharedPrompt | None = None,
    *,
    window: int | None = None,
    positions: jax.Array | None = None,
) -> AttentionMask:
    """The attention mask of texts with a mask [B, S], or [G * K, T] behind a prefix of G prompts.

    The arguments are those of `Model.layers`; positions are read with a window only.
    """
    if prefix is not None:
        own_mask = mask.reshape(prefix.mask.shape[0], -1, mask.shape[1])
        places = positions_from(prefix.mask)
        past = _past_mask(prefix.mask, places, positions, own_mask.shape, window)
        return AttentionMask(causal_mask(own_mask, window), past=past)
    if shared is None:
        return AttentionMask(causal_mask(mask, window)[:, None])
    length, shape = shared.length, (mask.shape[0], shared.responses, -1)
    own = causal_mask(mask[:, length:].reshape(shape), window)
    if not length:
        return AttentionMask(own)
    prompt = mask[:, :length]
    before = None if positions is None else positions[:, :length]
    after = None if positions is None else positions[:, length:]
    past = _past_mask(prompt, before, after, shape, window)
    return AttentionMask(own, causal_mask(prompt, window), past)


def _past_mask(mask, before, positions, shape, window):
    """`AttentionMask.past` of responses of a shape [B, K, T] behind a mask [B, P]."""
    seen = mask.astype(bool)[:, None, None]
    if window is None:
        return seen
    return seen & (positions.reshape(shape)[..., None] - before[:, None, None] < window)
