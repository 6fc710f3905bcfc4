"""The transformer block of GPT-2, as a Linen module."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.attention import Past, attend, attend_to_cache
from rlhf_jax.models.cudnn_attention import attend_by_cudnn, check_dropout
from rlhf_jax.models.dense import Dense
from rlhf_jax.models.dropout import drop, start_dropout
from rlhf_jax.parallel.constraints import constrain_batch, constrain_batch_over_data

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}

Memory = tuple[jax.Array, jax.Array]


class AttentionMask(NamedTuple):
    """Which tokens of [B, S] see which: P of a prompt, then K responses of T, S = P + K * T.

    Attributes:
      own: bool[B, K, T, T], of each response its own tokens.
      prompt: bool[B, P, P], of the prompt its own tokens; None where P is 0.
      past: bool[B, P], which tokens all responses see: those of the prompt, or of what keys and
        values are given of; None where there is nothing before them.
    """

    own: jax.Array
    prompt: jax.Array | None = None
    past: jax.Array | None = None


class Block(nn.Module):
    """One transformer block: layer norm before attention and before the MLP, and two additions.

    In decoding, one token of each row meets all parameters: these stay where they are, and the rows
    travel (Pope et al. 2022, section 3.2: weight-stationary layouts; arXiv:2211.05102).
    """

    config: Any
    dtype: str
    is_decoding: bool = False
    attention: str = "blocks"

    def setup(self):
        self.ln_1, self.ln_2 = (layer_norm(self.config, self.dtype) for _ in range(2))
        self.attn = _Attention(self.config, self.dtype, self.is_decoding, self.attention)
        self.mlp = _MLP(self.config, self.dtype, self.is_decoding)

    def __call__(self, x, sight: AttentionMask, past: Memory | None = None, deterministic=True):
        """([B, S, D], (keys, values) [B, H, S, d]) of [B, S, D] and what is known of a past."""
        attended, memory = self.attn(self._place(self.ln_1(x)), sight, past, deterministic)
        return self._rest(x, attended, deterministic), memory

    def heads(self, x):
        """Queries, keys and values [B, H, S, d] of [B, S, D]."""
        return self.attn.heads(self._place(self.ln_1(x)))

    def decode(self, x, q, keys, values, visible):
        """The rest of the block, of queries on a cache [B, H, C, d] that is bool[B, S, C] seen."""
        return self._rest(x, self.attn.merge(attend_to_cache(q, keys, values, visible)), True)

    def _rest(self, x, attended, deterministic):
        rate = self.config.resid_pdrop
        x = self._place(x + _dropped(self, attended, rate, deterministic))
        h = self.mlp(self._place(self.ln_2(x)))
        return self._place(x + _dropped(self, h, rate, deterministic))

    def _place(self, x):
        return constrain_batch_over_data(x, last="fsdp") if self.is_decoding else constrain_batch(x)


class _Attention(nn.Module):
    config: Any
    dtype: str
    is_decoding: bool
    attention: str

    def setup(self):
        width = self.config.n_embd
        # [D, 3, D]: what splits the last axis over devices gives each the same heads of all three.
        self.c_attn = _dense(self.config, self.dtype, (3, width))
        self.c_proj = _dense(self.config, self.dtype, (width,), residual_scale(self.config))

    def __call__(self, x, sight, past, deterministic):
        q, k, v = self.heads(x)
        dropout = None
        if not deterministic and self.config.attn_pdrop:
            check_dropout(self.attention, self.config.attn_pdrop)
            dropout = start_dropout(self.make_rng("dropout"), self.config.attn_pdrop)
        parts, length = [], 0
        if sight.prompt is not None:
            length = sight.prompt.shape[-1]
            past = k[:, :, :length], v[:, :, :length]
            prompt_q = q[:, None, :, :length]
            prompt_k, prompt_v = (x[:, None] for x in past)
            parts.append(self._attend(prompt_q, prompt_k, prompt_v, sight.prompt[:, None]))
        seen = None if sight.past is None else Past(past[0], past[1], sight.past)
        count = sight.own.shape[1]
        own_q, own_k, own_v = (_responses(x[:, :, length:], count) for x in (q, k, v))
        parts.append(self._attend(own_q, own_k, own_v, sight.own, seen, dropout))
        out = jnp.concatenate([_in_a_row(part) for part in parts], axis=2)
        return self.merge(out), (k, v)

    def _attend(self, q, k, v, visible, past=None, dropout=None):
        if self.attention == "cudnn":
            return attend_by_cudnn(q, k, v, visible, past)
        return attend(q, k, v, visible, past, dropout)

    def heads(self, x):
        """Scaled queries, keys and values, [B, H, S, d] each."""
        qkv = self.c_attn(x)
        qkv = constrain_batch_over_data(qkv, last="tensor") if self.is_decoding else qkv
        qkv = constrain_batch(qkv, last="tensor")
        heads = qkv.reshape(*qkv.shape[:3], self.config.n_head, -1)
        q, k, v = (jnp.swapaxes(heads[:, :, i], 1, 2) for i in range(3))
        return q * np.asarray(q.shape[-1] ** -0.5, q.dtype), k, v

    def merge(self, out):
        """[B, S, D] of [B, H, S, d]."""
        out = jnp.swapaxes(out, 1, 2)
        out = constrain_batch(out.reshape(*out.shape[:2], -1), last="tensor")
        out = constrain_batch_over_data(out, last="tensor") if self.is_decoding else out
        return self.c_proj(out)


def _responses(x, count):
    """[B, K, H, T, d] of [B, H, K * T, d]."""
    batch, heads, _, width = x.shape
    return jnp.swapaxes(x.reshape(batch, heads, count, -1, width), 1, 2)


def _in_a_row(x):
    """[B, H, K * T, d] of [B, K, H, T, d]."""
    batch, _, heads, _, width = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch, heads, -1, width)


class _MLP(nn.Module):
    config: Any
    dtype: str
    is_decoding: bool

    def setup(self):
        self.c_fc = _dense(self.config, self.dtype, (self.config.inner_width,))
        width = self.config.n_embd
        self.c_proj = _dense(self.config, self.dtype, (width,), residual_scale(self.config))

    def __call__(self, x):
        h = self.c_fc(x)
        h = (constrain_batch_over_data if self.is_decoding else constrain_batch)(h, last="tensor")
        return self.c_proj(ACTIVATIONS[self.config.activation_function](h))


def residual_scale(config: Any) -> float:
    """Of the deviation of what residual branches start from, which add up: Radford et al. 2.3."""
    return (2 * config.n_layer) ** -0.5


def _dense(config, dtype, features, scale=1.0):
    kernel_init = nn.initializers.normal(config.initializer_range * scale)
    return Dense(features, dtype, kernel_init)


def layer_norm(config: Any, dtype: str) -> nn.LayerNorm:
    """A layer norm with the epsilon of the configuration."""
    # The fast variance, E[x^2] - E[x]^2, cancels where a mean is large beside its deviation.
    return nn.LayerNorm(
        epsilon=config.layer_norm_epsilon, dtype=jnp.dtype(dtype), use_fast_variance=False
    )


def _dropped(module, x, rate, deterministic):
    """The array after dropout, where there is any."""
    if deterministic or not rate:
        return x
    return drop(start_dropout(module.make_rng("dropout"), rate), x)
