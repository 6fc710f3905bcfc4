"""The sizes and switches of the decoders in `decoder.py`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax

from rlhf_jax.checks import (
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
)
from rlhf_jax.errors import InputError
from rlhf_jax.models.config_values import LARGEST_SIZE, integer
from rlhf_jax.models.embedding import padded_vocab_size
from rlhf_jax.models.family import TOKEN_IDS, check_highest
from rlhf_jax.models.rope import Rope

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
}

# The names in Hugging Face of the norms before and after attention, and before and after the MLP.
NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}

# The largest sizes: a larger one is a mistake, found before anything is allocated for it.
SIZES = {
    "vocab_size": LARGEST_SIZE,
    "hidden_size": LARGEST_SIZE,
    "intermediate_size": LARGEST_SIZE,
    "num_hidden_layers": 100_000,
    "num_attention_heads": LARGEST_SIZE,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and switches of a decoder, under the names of Llama's config.json where it has any.

    Attributes:
      model_type: the family in config.json; the network does not read it.
      head_dim: d, the width of a head; queries have `num_attention_heads` of them, keys and values
        `num_key_value_heads`.
      norm_position: norms "before" attention and MLP, "after" them, or "both".
      norm_offset: RMSNorm multiplies by scale + offset.
      norm_casts_last: whether the scale multiplies in float32, and not in the compute dtype.
      qk_norm: RMSNorm of queries and keys: "none", of each "head", or of the full "projection".
      qkv_bias, o_bias, mlp_bias: whether the projections have biases.
      fused_projections: one kernel for queries, keys and values, and one for gate and up.
      layer_types: "full_attention" or "sliding_attention" of each layer.
      sliding_window: w, the positions that a token of a sliding layer sees, its own included.
      rope, sliding_rope: of full and of sliding layers.
      no_rope_layers: for each layer 1 if it has rotary positions, and 0 if it has none; empty where
        all have.
      attention_scale: of q . k.
      attention_softcap, logit_softcap: c in c * tanh(x / c) for q . k and for logits.
      embedding_scale, residual_scale: multiply the embedding, and the outputs of attention and MLP.
      rounds_embedding_scale: whether the first of them is rounded to the compute dtype.
      logit_divisor: divides the logits.
      source: the config.json that this was read from, as JSON text, whose keys are written again;
        ignored in comparisons.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    model_type: str = "llama"
    hidden_act: Activation = "silu"
    rms_norm_eps: PositiveFloat = 1e-6
    initializer_range: NonNegativeFloat = 0.02
    tie_word_embeddings: bool = False
    attention_dropout: FractionBelowOne = 0.0
    norm_position: Literal["before", "after", "both"] = "before"
    norm_offset: float = 0.0
    norm_casts_last: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    rope: Rope = Rope()
    sliding_rope: Rope | None = None
    no_rope_layers: tuple[int, ...] = ()
    attention_scale: PositiveFloat | None = None
    attention_softcap: PositiveFloat | None = None
    logit_softcap: PositiveFloat | None = None
    embedding_scale: PositiveFloat = 1.0
    rounds_embedding_scale: bool = False
    residual_scale: PositiveFloat = 1.0
    logit_divisor: PositiveFloat = 1.0
    bos_token_id: NonNegativeInt | None = None
    eos_token_id: NonNegativeInt | None = None
    pad_token_id: NonNegativeInt | None = None
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_fields("config", self)
        for name, highest in SIZES.items():
            check_highest(self, highest, [name])
        sizes = ("num_key_value_heads", "head_dim", "max_position_embeddings")
        check_highest(self, LARGEST_SIZE, sizes)
        check_highest(self, self.vocab_size - 1, TOKEN_IDS)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads must be a multiple of num_key_value_heads, but "
                f"{self.num_attention_heads} is not a multiple of {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary positions, but is {self.head_dim}.")
        self._check_layers()

    def _check_layers(self) -> None:
        for name, allowed in (
            ("no_rope_layers", (0, 1)),
            ("layer_types", ("full_attention", "sliding_attention")),
        ):
            values = getattr(self, name)
            if values and (len(values) != self.num_hidden_layers or set(values) - set(allowed)):
                raise InputError(
                    f"{name} must hold {' or '.join(map(str, allowed))} for each of the "
                    f"{self.num_hidden_layers} layers, but is {list(values)}."
                )
        if any(self.is_sliding):
            integer("sliding_window", self.sliding_window)

    @property
    def n_embd(self) -> int:
        """D."""
        return self.hidden_size

    @property
    def n_layer(self) -> int:
        """The number of layers."""
        return self.num_hidden_layers

    @property
    def n_positions(self) -> int:
        """The maximum length of a sequence."""
        return self.max_position_embeddings

    @property
    def n_head(self) -> int:
        """The number of heads of queries."""
        return self.num_attention_heads

    @property
    def head_width(self) -> int:
        """d."""
        return self.head_dim

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        """Whether each layer attends within the window."""
        types = self.layer_types or ("full_attention",) * self.num_hidden_layers
        return tuple(kind == "sliding_attention" for kind in types)

    @property
    def padded_vocab_size(self) -> int:
        """Length of the vocabulary axis of the embedding; see `models/embedding.py`."""
        return padded_vocab_size(self.vocab_size)
