"""Which tokens see which: texts, packed texts, and prompts with several responses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.models.cache import Cache
from rlhf_jax.models.interface import SharedPrompt


class Past(NamedTuple):
    """Keys and values before all responses of a group, seen by each of their tokens.

    Attributes:
      keys, values: [G, Hk, P, d], Hk key/value heads.
      mask: bool[G, P], True on real tokens.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array


class AttentionMask(NamedTuple):
    """Which tokens of [B, S] see which: P of a prompt, then K responses of T, S = P + K * T.

    Attributes:
      own: bool[B, K, T, T], tokens of each response among themselves.
      prompt: bool[B, P, P], tokens of the prompt among themselves; None where P is 0.
      past: bool[B, P], the tokens that all responses see: those of the prompt, or of a prefix whose
        keys and values are an argument; None where nothing is before them.
    """

    own: jax.Array
    prompt: jax.Array | None = None
    past: jax.Array | None = None


def causal_mask(mask: jax.Array) -> jax.Array:
    """bool[..., L, L]: whether token l sees token m: a real one of its segment, not after it.

    Args:
      mask: bool[..., L], or i32[..., L] segments, 0 on padding.
    """
    segments = mask.astype(jnp.int32)
    same = (segments[..., :, None] == segments[..., None, :]) & (segments[..., None, :] > 0)
    index = jnp.arange(mask.shape[-1])
    return same & (index[:, None] >= index[None, :])


def attention_mask(
    mask: jax.Array, prefix: Cache | None = None, shared: SharedPrompt | None = None
) -> AttentionMask:
    """The attention mask of texts with a mask [B, S], or [G * K, T] behind a prefix of G prompts.

    The arguments are those of `Model.layers`.
    """
    if prefix is not None:
        own = mask.reshape(prefix.mask.shape[0], -1, mask.shape[1])
        return AttentionMask(causal_mask(own), past=prefix.mask)
    if shared is None:
        return AttentionMask(causal_mask(mask)[:, None])
    prompt, own = mask[:, : shared.length], mask[:, shared.length :]
    own = causal_mask(own.reshape(mask.shape[0], shared.responses, -1))
    return AttentionMask(own, causal_mask(prompt), prompt) if shared.length else AttentionMask(own)
