"""GPT-2 (Radford et al. 2019): the network, its partition rules, and its Hugging Face format.

Pre-layer-norm blocks with a tanh-approximated GELU, learned positions, and an unembedding that is
tied to the token embedding, or not.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rlhf_jax.checks import (
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
)
from rlhf_jax.errors import InputError
from rlhf_jax.models.attention import Memory, attend_to_cache, self_attention
from rlhf_jax.models.attention_mask import AttentionMask
from rlhf_jax.models.cudnn_attention import check_dropout
from rlhf_jax.models.dense import Dense
from rlhf_jax.models.dropout import drop, start_dropout
from rlhf_jax.models.embedding import lookup, padded_vocab_size
from rlhf_jax.models.family import (
    TOKEN_IDS,
    Family,
    Slot,
    check_fixed,
    check_highest,
    known_fields,
    leaf_at,
    param_shapes,
)
from rlhf_jax.models.interface import Params
from rlhf_jax.models.layers import merged_heads
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.models.stacked import StackedModel
from rlhf_jax.parallel.constraints import constrain_batch, constrain_batch_over_data
from rlhf_jax.parallel.partition import Rules

Activation = Literal["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}

PARTITION_RULES: Rules = (
    (r"(wte|lm_head)/embedding", P("tensor", "fsdp")),
    (r"wpe/embedding", P(None, "fsdp")),
    (r"c_attn/kernel", P(None, "fsdp", None, "tensor")),
    (r"c_attn/bias", P(None, None, "tensor")),
    (r"c_fc/kernel", P(None, "fsdp", "tensor")),
    (r"c_proj/kernel", P(None, "tensor", "fsdp")),
    (r"c_fc/bias", P(None, "tensor")),
    # Small, and read in full by every device.
    (r"(ln_1|ln_2)/(scale|bias)|c_proj/bias", P()),
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes and constants of a GPT-2, under Hugging Face's names. The default is GPT-2 small.

    `source` is the config.json that it was read from, as that of `DecoderConfig`.
    """

    vocab_size: PositiveInt = 50257
    n_positions: PositiveInt = 1024
    n_embd: PositiveInt = 768
    n_layer: PositiveInt = 12
    n_head: PositiveInt = 12
    n_inner: PositiveInt | None = None
    activation_function: Activation = "gelu_new"
    resid_pdrop: FractionBelowOne = 0.1
    embd_pdrop: FractionBelowOne = 0.1
    attn_pdrop: FractionBelowOne = 0.1
    layer_norm_epsilon: PositiveFloat = 1e-5
    initializer_range: NonNegativeFloat = 0.02
    bos_token_id: NonNegativeInt | None = None
    eos_token_id: NonNegativeInt | None = None
    pad_token_id: NonNegativeInt | None = None
    tie_word_embeddings: bool = True
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_fields("config", self)
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_inner")
        check_highest(self, 2**31 - 1, sizes)
        check_highest(self, self.vocab_size - 1, TOKEN_IDS)
        if self.n_embd % self.n_head:
            raise InputError(
                f"n_embd must be a multiple of n_head, but {self.n_embd} is none of {self.n_head}."
            )

    @property
    def inner_width(self) -> int:
        """Width of the hidden layer of the MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def head_width(self) -> int:
        """d, the width of one head of attention."""
        return self.n_embd // self.n_head

    @property
    def num_key_value_heads(self) -> int:
        """As many as query heads."""
        return self.n_head


class Block(nn.Module):
    """A layer, with the methods of `layers.Block`.

    In decoding, single tokens are multiplied with all parameters: these stay where they are, and
    the activations move (Pope et al. 2022, section 3.2: weight-stationary layouts;
    arXiv:2211.05102).
    """

    config: GPT2Config
    dtype: str
    attention: str = "blocks"
    decode: bool = False

    def setup(self):
        self.ln_1, self.ln_2 = (_layer_norm(self.config, self.dtype) for _ in range(2))
        self.attn = _Attention(self.config, self.dtype, self.attention, self.decode)
        self.mlp = _MLP(self.config, self.dtype, self.decode)

    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask,
        rotation: None = None,
        past: Memory | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Memory]:
        attended, memory = self.attn(self._place(self.ln_1(x)), mask, past, deterministic)
        return self._rest(x, attended, deterministic), memory

    def heads(self, x: jax.Array, rotation: None) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.attn.heads(self._place(self.ln_1(x)))

    def attend(self, q, keys, values, visible):
        return attend_to_cache(q, keys, values, visible)

    def rest(self, x, attended):
        return self._rest(x, self.attn.merge(attended), True)

    def _rest(self, x, attended, deterministic):
        rate = self.config.resid_pdrop
        x = self._place(x + _dropped(self, attended, rate, deterministic))
        h = self.mlp(self._place(self.ln_2(x)))
        return self._place(x + _dropped(self, h, rate, deterministic))

    def _place(self, x):
        return constrain_batch_over_data(x, last="fsdp") if self.decode else constrain_batch(x)


class _Attention(nn.Module):
    config: GPT2Config
    dtype: str
    attention: str
    decode: bool

    def setup(self):
        # [D, 3, D]: splitting the last axis over devices gives each the same heads of all three.
        self.c_attn = _dense(self.config, self.dtype, (3, self.config.n_embd))
        self.c_proj = _residual(self.config, self.dtype)

    def __call__(self, x, mask, past, deterministic):
        q, k, v = self.heads(x)
        dropout = None
        if not deterministic and self.config.attn_pdrop:
            check_dropout(self.attention, self.config.attn_pdrop)
            dropout = start_dropout(self.make_rng("dropout"), self.config.attn_pdrop)
        out = self_attention(q, k, v, mask, past, implementation=self.attention, dropout=dropout)
        return self.merge(out), (k, v)

    def heads(self, x):
        """Scaled queries, keys and values, [B, H, S, d] each."""
        qkv = self.c_attn(x)
        qkv = constrain_batch_over_data(qkv, last="tensor") if self.decode else qkv
        qkv = constrain_batch(qkv, last="tensor")
        heads = qkv.reshape(*qkv.shape[:3], self.config.n_head, -1)
        q, k, v = (jnp.swapaxes(heads[:, :, i], 1, 2) for i in range(3))
        return q * np.asarray(q.shape[-1] ** -0.5, q.dtype), k, v

    def merge(self, out):
        """[B, S, D] of [B, H, S, d]."""
        return self.c_proj(merged_heads(out, decode=self.decode))


class _MLP(nn.Module):
    config: GPT2Config
    dtype: str
    decode: bool

    def setup(self):
        self.c_fc = _dense(self.config, self.dtype, (self.config.inner_width,))
        self.c_proj = _residual(self.config, self.dtype)

    def __call__(self, x):
        h = self.c_fc(x)
        h = (constrain_batch_over_data if self.decode else constrain_batch)(h, last="tensor")
        return self.c_proj(ACTIVATIONS[self.config.activation_function](h))


def _residual(config: GPT2Config, dtype: str) -> Dense:
    """A projection of a residual branch; these add up: Radford et al., 2.3."""
    return _dense(config, dtype, (config.n_embd,), (2 * config.n_layer) ** -0.5)


def _dense(config, dtype, features, scale=1.0):
    return Dense(features, dtype, nn.initializers.normal(config.initializer_range * scale))


def _layer_norm(config: GPT2Config, dtype: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels where a mean is large beside its deviation.
    return nn.LayerNorm(
        epsilon=config.layer_norm_epsilon, dtype=jnp.dtype(dtype), use_fast_variance=False
    )


def _dropped(module, x, rate, deterministic):
    if deterministic or not rate:
        return x
    return drop(start_dropout(module.make_rng("dropout"), rate), x)


@dataclasses.dataclass(frozen=True)
class GPT2(StackedModel):
    """GPT-2 as pure functions over a pytree of parameters; methods as in `models/interface.py`.

    Args:
      config: the sizes.
      dtype, remat, attention: as in `models/stacked.py`.

    The parameters are `{"wte": {"embedding": [Vp, D]}, "wpe": {"embedding": [n_positions, D]},
    "layers": blocks stacked on axis 0, "ln_f": {"scale": [D], "bias": [D]}}`, and `"lm_head":
    {"embedding": [Vp, D]}` where the unembedding is not tied to the token embedding.

    >>> model = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    >>> params = model.init(jax.random.key(0))
    >>> hidden = model.hidden(params, jnp.array([[1, 2, 3]]))
    >>> model.logits(params, hidden).shape
    (1, 3, 10)
    """

    config: GPT2Config

    table, final_norm, norms = "wte", "ln_f", "ln_"
    rules = PARTITION_RULES
    no_weight_decay = ("bias", "scale", "lora_magnitude")

    @property
    def block(self) -> Block:
        return Block(self.config, self.dtype, self.attention)

    def check_dropout(self) -> None:
        check_dropout(self.attention, self.config.attn_pdrop)

    @functools.partial(jax.jit, static_argnums=0)  # else each operation is compiled by itself
    def init(self, key: jax.Array) -> Params:
        """Float32 parameters: N(0, initializer_range), residual projections over sqrt(2 N)."""
        config = self.config
        wte_key, wpe_key, *keys = jax.random.split(key, 2 + config.n_layer)
        normal = nn.initializers.normal(config.initializer_range)
        wte = normal(wte_key, (padded_vocab_size(config.vocab_size), config.n_embd))
        is_token = jnp.arange(len(wte))[:, None] < config.vocab_size
        x, mask = jnp.zeros((1, 1, config.n_embd)), AttentionMask(jnp.ones((1, 1, 1, 1), bool))
        block = Block(config, self.dtype)  # its parameters are the same for any attention
        init, width = jax.vmap(block.init, (0, None, None)), (config.n_embd,)
        params = {
            "wte": {"embedding": jnp.where(is_token, wte, 0.0)},
            "wpe": {"embedding": normal(wpe_key, (config.n_positions, config.n_embd))},
            "layers": init(jnp.stack(keys), x, mask)["params"],
            "ln_f": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        }
        if not config.tie_word_embeddings:
            output = normal(jax.random.fold_in(wte_key, 1), wte.shape)
            params["lm_head"] = {"embedding": jnp.where(is_token, output, 0.0)}
        return params

    def embed(self, params, tokens, positions, *, decode=False, dropout_key=None):
        x = lookup(params["wte"], constrain_batch_over_data(tokens)).astype(self.dtype)
        x += lookup(params["wpe"], constrain_batch_over_data(positions)).astype(self.dtype)
        x = constrain_batch_over_data(x, last="fsdp")
        x = x if decode else constrain_batch(x)
        if dropout_key is None or not self.config.embd_pdrop:
            return x
        return drop(start_dropout(dropout_key, self.config.embd_pdrop), x)

    def final(self, params, x):
        return _layer_norm(self.config, self.dtype).apply({"params": params["ln_f"]}, x)

    def shift_final(self, params, shift):
        norm = params["ln_f"]
        return {**params, "ln_f": {**norm, "bias": norm["bias"] + shift}}


# Variants of GPT-2 that are not computed here: each key may be absent or have this value.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
_EOS = 50256  # BOS and EOS in transformers where a GPT-2 configuration has none

# Name of a tensor -> path in the parameters. Hugging Face's Conv1D kernels are [in, out] as ours.
_TOP: dict[str, tuple[str, ...]] = {
    "wte.weight": ("wte", "embedding"),
    "wpe.weight": ("wpe", "embedding"),
    "ln_f.weight": ("ln_f", "scale"),
    "ln_f.bias": ("ln_f", "bias"),
}
_LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def _slots(model: GPT2) -> dict[str, Slot]:
    config, params = model.config, param_shapes(model)
    slots = {name: Slot(path, None, leaf_at(params, path).shape) for name, path in _TOP.items()}
    vocabulary = (config.vocab_size, config.n_embd)
    slots["wte.weight"] = slots["wte.weight"]._replace(shape=vocabulary)
    if not config.tie_word_embeddings:
        slots["lm_head.weight"] = Slot(("lm_head", "embedding"), None, vocabulary)
    for layer in range(config.n_layer):
        for module in _LAYER:
            weight = "scale" if module.startswith("ln_") else "kernel"
            for name, leaf in (("weight", weight), ("bias", "bias")):
                path = ("layers", *module.split("."), leaf)
                shape = leaf_at(params, path).shape[1:]
                if module == "attn.c_attn":  # [D, 3, D] and [3, D] here
                    shape = (*shape[:-2], 3 * config.n_embd)
                slots[f"h.{layer}.{module}.{name}"] = Slot(path, layer, shape)
    return slots


def _read_config(data: Mapping[str, Any]) -> GPT2Config:
    check_fixed(data, _FIXED)
    values = known_fields(GPT2Config, {**data, "source": json.dumps(dict(data), sort_keys=True)})
    if values.get("vocab_size", GPT2Config.vocab_size) > _EOS:
        values = {"bos_token_id": _EOS, "eos_token_id": _EOS, **values}
    return GPT2Config(**values)


def _write_config(config: GPT2Config, is_classifier: bool) -> dict[str, Any]:
    own = dataclasses.asdict(config)
    return {"use_cache": True, **json.loads(own.pop("source")), **own, **_FIXED}


def _fresh_config(settings: ModelSettings, vocab_size: int) -> GPT2Config:
    sizes = (settings.n_positions, settings.n_embd, settings.n_layer, settings.n_head)
    rate = settings.dropout
    return GPT2Config(vocab_size, *sizes, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate)


FAMILY = Family(
    name="GPT-2",
    model_type="gpt2",
    language_model="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    config=GPT2Config,
    model=GPT2,
    read_config=_read_config,
    write_config=_write_config,
    fresh_config=_fresh_config,
    slots=_slots,
    prefix="transformer.",
    tied={"lm_head.weight": "wte.weight"},
    ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks in old checkpoints
    sizes={  # Radford et al., table 2
        "gpt2": GPT2Config(),
        "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
        "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
        "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    },
)
