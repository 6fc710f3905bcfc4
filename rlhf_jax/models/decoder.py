"""Decoders such as Llama, Mistral, Qwen, Gemma, SmolLM, OLMo, Phi and Granite: one network.

Blocks of RMSNorm, grouped-query attention with rotary positions, and a gated MLP. Families differ
in the switches of `DecoderConfig`, which `decoder_families.py` reads from config.json; the network
branches on nothing else.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import InputError
from rlhf_jax.models.attention import Memory, attend_to_cache, self_attention
from rlhf_jax.models.attention_mask import AttentionMask
from rlhf_jax.models.cudnn_attention import check_dropout
from rlhf_jax.models.decoder_config import ACTIVATIONS, NORMS, DecoderConfig
from rlhf_jax.models.dense import Dense
from rlhf_jax.models.dropout import start_dropout
from rlhf_jax.models.embedding import lookup
from rlhf_jax.models.interface import Params
from rlhf_jax.models.layers import Context, LayerKinds, Rotation, merged_heads
from rlhf_jax.models.rope import rotate, rotations
from rlhf_jax.models.stacked import StackedModel
from rlhf_jax.parallel.constraints import constrain_batch, constrain_batch_over_data
from rlhf_jax.parallel.partition import Rules

PARTITION_RULES: Rules = (
    (r"(embed_tokens|lm_head)/embedding", P("tensor", "fsdp")),
    (
        r"(q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj)/kernel",
        P(None, "fsdp", "tensor"),
    ),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/bias", P(None, "tensor")),
    (r"(o_proj|down_proj)/kernel", P(None, "tensor", "fsdp")),
    # Small, and read in full by every device.
    (r"\w*norm/scale|(o_proj|down_proj)/bias", P()),
)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (scale + offset) over the last axis, the quotient in float32.

    Zhang and Sennrich 2019, Root Mean Square Layer Normalization (arXiv:1910.07467).
    """

    config: DecoderConfig
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.constant(1.0 - self.config.norm_offset)
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        scale = scale.astype(jnp.float32) + self.config.norm_offset
        if self.config.norm_casts_last:
            return (x * scale).astype(self.dtype)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Block(nn.Module):
    """A layer, with the methods of `layers.Block`; decoding as in `models/gpt2.py`."""

    config: DecoderConfig
    dtype: str
    attention: str = "blocks"
    decode: bool = False

    def setup(self):
        config, dtype = self.config, self.dtype
        names = NORMS[config.norm_position]
        norms = (None if name is None else RMSNorm(config, dtype, name=name) for name in names)
        self.before, self.after, self.before_mlp, self.after_mlp = norms
        self.self_attn = _Attention(config, dtype, self.attention, self.decode)
        self.mlp = _MLP(config, dtype, self.decode)

    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask,
        rotation: Rotation,
        past: Memory | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Memory]:
        h = self._place(_optional(self.before, x))
        attended, memory = self.self_attn(h, mask, rotation, past, deterministic)
        return self._rest(x, attended), memory

    def heads(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.self_attn.heads(self._place(_optional(self.before, x)), rotation)

    def attend(self, q, keys, values, visible):
        return attend_to_cache(q, keys, values, visible, softcap=self.config.attention_softcap)

    def rest(self, x, attended):
        return self._rest(x, self.self_attn.merge(attended))

    def _rest(self, x, attended):
        x = self._add(x, _optional(self.after, attended))
        h = self.mlp(self._place(_optional(self.before_mlp, x)))
        return self._add(x, _optional(self.after_mlp, h))

    def _add(self, x, branch):
        return self._place(x + _scaled(branch, self.config.residual_scale))

    def _place(self, x):
        return constrain_batch_over_data(x, last="fsdp") if self.decode else constrain_batch(x)


def _optional(norm, x):
    return x if norm is None else norm(x)


def _scaled(x, scale):
    """The product in float32, in the dtype of x."""
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)


class _Attention(nn.Module):
    config: DecoderConfig
    dtype: str
    attention: str
    decode: bool

    def setup(self):
        config = self.config
        self.widths = [
            heads * config.head_dim
            for heads in (config.num_attention_heads, *(config.num_key_value_heads,) * 2)
        ]
        dense = functools.partial(_dense, config, self.dtype, use_bias=config.qkv_bias)
        if config.fused_projections:
            self.qkv_proj = dense(sum(self.widths))
        else:
            self.q_proj, self.k_proj, self.v_proj = (dense(width) for width in self.widths)
        if config.qk_norm != "none":
            self.q_norm, self.k_norm = (RMSNorm(config, self.dtype) for _ in range(2))
        self.o_proj = _dense(config, self.dtype, config.hidden_size, use_bias=config.o_bias)

    def __call__(self, x, mask, rotation, past, deterministic):
        q, k, v = self.heads(x, rotation)
        dropout, rate = None, self.config.attention_dropout
        if not deterministic and rate:
            check_dropout(self.attention, rate)
            dropout = start_dropout(self.make_rng("dropout"), rate)
        out = self_attention(
            q,
            k,
            v,
            mask,
            past,
            implementation=self.attention,
            softcap=self.config.attention_softcap,
            dropout=dropout,
        )
        return self.merge(out), (k, v)

    def heads(self, x, rotation):
        """Scaled queries [B, H, S, d], and keys and values [B, Hk, S, d]."""
        config = self.config
        if config.fused_projections:
            bounds = np.cumsum(self.widths)[:2].tolist()
            parts = jnp.split(self.qkv_proj(x), bounds, axis=-1)
        else:
            parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if config.qk_norm == "projection":
            parts = [self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]]
        q, k, v = (self._heads_of(part) for part in parts)
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        scale = config.attention_scale or config.head_dim**-0.5
        return rotate(q, rotation, scale), rotate(k, rotation), v

    def _heads_of(self, x):
        """[B, H, S, d] of [B, S, H * d]."""
        x = constrain_batch_over_data(x, last="tensor") if self.decode else x
        x = constrain_batch(x, last="tensor")
        return jnp.swapaxes(x.reshape(*x.shape[:2], -1, self.config.head_dim), 1, 2)

    def merge(self, out):
        """[B, S, D] of [B, H, S, d]."""
        return self.o_proj(merged_heads(out, decode=self.decode))


class _MLP(nn.Module):
    config: DecoderConfig
    dtype: str
    decode: bool

    def setup(self):
        config = self.config
        dense = functools.partial(_dense, config, self.dtype, use_bias=config.mlp_bias)
        if config.fused_projections:
            self.gate_up_proj = dense(2 * config.intermediate_size)
        else:
            self.gate_proj, self.up_proj = (dense(config.intermediate_size) for _ in range(2))
        self.down_proj = dense(config.hidden_size)

    def __call__(self, x):
        if self.config.fused_projections:
            parts = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            parts = [self.gate_proj(x), self.up_proj(x)]
        place = constrain_batch_over_data if self.decode else constrain_batch
        gate, up = (place(part, last="tensor") for part in parts)
        return self.down_proj(ACTIVATIONS[self.config.hidden_act](gate) * up)


def _dense(config, dtype, features, *, use_bias):
    kernel_init = nn.initializers.normal(config.initializer_range)
    return Dense((features,), dtype, kernel_init, use_bias)


@dataclasses.dataclass(frozen=True)
class Decoder(StackedModel):
    """A decoder as pure functions over a pytree of parameters; methods as in `interface.Model`.

    Args:
      config: sizes and switches.
      dtype, remat, attention: as in `models/stacked.py`.

    The parameters are `{"embed_tokens": {"embedding": [Vp, D]}, "layers": blocks stacked on axis 0,
    "norm": {"scale": [D]}}`, and `"lm_head": {"embedding": [Vp, D]}` where it is not tied.

    >>> config = DecoderConfig(10, 8, 16, 2, 2, 1, 4, 8)
    >>> model = Decoder(config)
    >>> params = model.init(jax.random.key(0))
    >>> hidden = model.hidden(params, jnp.array([[1, 2, 3]]))
    >>> model.logits(params, hidden).shape
    (1, 3, 10)
    """

    config: DecoderConfig

    table, final_norm, norms = "embed_tokens", "norm", "norm"
    rules = PARTITION_RULES
    final_has_bias = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention == "cudnn" and self.config.attention_softcap is not None:
            raise InputError(
                "The attention cudnn has no softcap, which this model needs; set model.attention "
                "to blocks."
            )

    @property
    def block(self) -> Block:
        return Block(self.config, self.dtype, self.attention)

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        return self.config.is_sliding

    @property
    def window(self) -> int | None:
        if not any(self.is_sliding):
            return None
        return min(self.config.sliding_window or 0, self.config.max_position_embeddings)

    def context(self, positions: jax.Array, layers: slice) -> Context:
        config, window = self.config, self.window
        ropes = (config.rope, config.sliding_rope or config.rope, None)
        sliding = np.array(config.is_sliding)
        has_rope = np.array(config.no_rope_layers or [1] * config.num_hidden_layers)
        kinds = LayerKinds(sliding, np.where(has_rope == 0, 2, sliding).astype(np.int32))
        kinds = LayerKinds(*(kind[layers] for kind in kinds))
        if window is None and not config.no_rope_layers:
            return Context(rotations(ropes[:1], positions, config.head_dim))
        return Context(rotations(ropes, positions, config.head_dim), kinds, window)

    def check_dropout(self) -> None:
        check_dropout(self.attention, self.config.attention_dropout)

    @functools.partial(jax.jit, static_argnums=0)  # else each operation is compiled by itself
    def init(self, key: jax.Array) -> Params:
        """Float32 parameters: matrices from N(0, initializer_range), norms as the identity."""
        config, size = self.config, (self.config.padded_vocab_size, self.config.hidden_size)
        embed_key, output_key, *keys = jax.random.split(key, 2 + config.num_hidden_layers)
        normal = nn.initializers.normal(config.initializer_range)
        is_token = jnp.arange(size[0])[:, None] < config.vocab_size
        x, mask = jnp.zeros((1, 1, size[1])), AttentionMask(jnp.ones((1, 1, 1, 1), bool))
        angle = jnp.zeros((1, 1, config.head_dim // 2))
        block = Block(config, self.dtype)  # its parameters are the same for any attention
        init = functools.partial(block.init, x=x, mask=mask, rotation=(angle, angle))
        params = {
            "embed_tokens": {"embedding": jnp.where(is_token, normal(embed_key, size), 0.0)},
            "layers": jax.vmap(init)(jnp.stack(keys))["params"],
            "norm": {"scale": jnp.full(size[1:], 1.0 - config.norm_offset)},
        }
        if not config.tie_word_embeddings:
            params["lm_head"] = {"embedding": jnp.where(is_token, normal(output_key, size), 0.0)}
        return params

    def embed(self, params, tokens, positions, *, decode=False, dropout_key=None):
        x = lookup(params[self.table], constrain_batch_over_data(tokens)).astype(self.dtype)
        scale = self.config.embedding_scale
        if self.config.rounds_embedding_scale:
            scale = float(np.asarray(scale, x.dtype))
        x = constrain_batch_over_data(_scaled(x, scale), last="fsdp")
        return x if decode else constrain_batch(x)

    def final(self, params, x):
        return RMSNorm(self.config, self.dtype).apply({"params": params["norm"]}, x)

    def shift_final(self, params, shift):
        """Raises a ValueError: the final norm has no bias."""
        raise ValueError(f"The final norm of {self.config.model_type} has no bias.")

    @property
    def logit_scale(self) -> float:
        return 1.0 / self.config.logit_divisor

    @property
    def logit_softcap(self) -> float | None:
        """The limit of logits."""
        return self.config.logit_softcap
