"""The methods of `interface.Model` that families of stacked blocks share."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.models import embedding
from rlhf_jax.models.cache import Cache, empty_cache
from rlhf_jax.models.cudnn_attention import check_head_width
from rlhf_jax.models.interface import Params, SharedPrompt, positions_from
from rlhf_jax.models.layers import Block, Context, apply_layers
from rlhf_jax.models.settings import (
    Attention,
    Remat,
    check_attention,
    check_cudnn_dtype,
    check_remat,
)
from rlhf_jax.models.stack import (
    cast,
    depth,
    merge_stack,
    multiplied_parameters,
    split_stack,
    unstack_for_decoding,
)
from rlhf_jax.parallel.partition import Rules


@dataclasses.dataclass(frozen=True)
class StackedModel(abc.ABC):
    """A model of a token embedding, a stack of blocks and a final norm.

    A family adds `init`, `embed`, `final`, `shift_final`, `check_dropout`, `partition_rules` and
    `block`; the methods here are described in `interface.Model`.

    Args:
      config: sizes, as in `interface.ModelConfig`, and `n_head`, `num_key_value_heads`,
        `head_width` and `tie_word_embeddings`.
      dtype: the compute dtype of products; parameters stay float32, logits come out in float32.
      remat: the values that the backward pass computes again, as in `models/remat.py`.
      attention: "blocks", as in `models/attention.py`, or "cudnn", as in
        `models/cudnn_attention.py`; decoding attends as by the first either way.

    Attributes of the class:
      table: the name of the token embedding among the parameters.
      final_norm: the name of the final norm.
      norms: a part of the paths of norms, which decoding leaves in float32.
    """

    config: Any
    dtype: str = "float32"
    remat: Remat = "dots"
    attention: Attention = "blocks"

    table: ClassVar[str]
    final_norm: ClassVar[str]
    norms: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        check_remat("remat", self.remat)
        check_attention("attention", self.attention)
        if self.attention == "cudnn":
            check_cudnn_dtype(self.dtype)
            check_head_width(self.config.head_width)

    @property
    @abc.abstractmethod
    def partition_rules(self) -> Rules:
        """The rules of the parameters."""

    @property
    @abc.abstractmethod
    def block(self) -> Block:
        """The module of one layer."""

    def context(self, positions: jax.Array, layers: slice) -> Context:
        """Inputs that these layers share at i32[B, L] positions; here none."""
        return Context()

    @property
    def output(self) -> str:
        """The name of the unembedding among the parameters: the token embedding if it is tied."""
        return self.table if self.config.tie_word_embeddings else "lm_head"

    @abc.abstractmethod
    def embed(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        decode: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The input of the first layer."""

    @abc.abstractmethod
    def final(self, params: Params, x: jax.Array) -> jax.Array:
        """The final norm."""

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises an InputError if the mesh does not divide the heads of attention."""
        parts = mesh.shape["tensor"]
        for name in ("n_head", "num_key_value_heads"):
            if (heads := getattr(self.config, name)) % parts:
                raise InputError(
                    f"The model has {name} = {heads} heads of attention, which are not divisible "
                    f"by mesh.tensor = {parts}; choose a tensor that divides them, or use fsdp "
                    "instead."
                )

    def flops_per_token(self, params: Params, *, unembeds: bool) -> float:
        """Twice the parameters in kernels, and in the unembedding if it unembeds."""
        pattern = rf"kernel|{self.output}/\w+" if unembeds else "kernel"
        return 2.0 * multiplied_parameters(params, pattern)

    def layers(
        self,
        stack: Params,
        x: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        cache: Cache | None = None,
        prefix: Cache | None = None,
        shared: SharedPrompt | None = None,
        *,
        dropout_key: jax.Array | None = None,
        first_layer: int | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs a stack of blocks."""
        count = depth(stack)
        first = self.config.n_layer - count if first_layer is None else first_layer
        return apply_layers(
            self.block,
            stack,
            x,
            mask,
            positions,
            cache,
            prefix,
            shared,
            dropout_key,
            self.context(positions, slice(first, first + count)),
            dtype=self.dtype,
            rules=self.partition_rules,
            remat=self.remat,
        )

    def for_decoding(self, params: Params) -> Params:
        """In the compute dtype but for norms; on one CPU unstacked, the unembedding in columns."""
        if embedding.is_for_decoding(params[self.output]):
            return params
        params = cast(params, self.dtype, is_kept=lambda path: self.norms in path)
        table = embedding.table_for_decoding(params[self.output])
        return {**params, self.output: table, "layers": unstack_for_decoding(params["layers"])}

    def unembedding(self, params: Params) -> jax.Array:
        """[Vp, D], the token embedding if it is tied."""
        embedding.check_trainable(params[self.output])
        return params[self.output]["embedding"]

    def logits(self, params: Params, hidden: jax.Array, *, decode: bool = False) -> jax.Array:
        """f32[..., V] logits of [..., D] hidden states."""
        return self._products(params, hidden, decode)[..., : self.config.vocab_size]

    def padded_logits(
        self, params: Params, hidden: jax.Array, *, decode: bool = False
    ) -> jax.Array:
        """f32[..., Vp], -inf from V on; cutting them off costs a copy, forwards and backwards."""
        logits = self._products(params, hidden, decode)
        return embedding.mask_padding(logits, self.config.vocab_size)

    def _products(self, params, hidden, decode):
        table, rules = params[self.output], self.partition_rules
        return embedding.unembed(self.output, table, hidden, self.dtype, rules, decode=decode)

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          params: of `init`.
          tokens: i32[B, L], L at most `config.n_positions`.
          mask: bool[B, L], True on real tokens, padded left or right; or i32[B, L] segments of
            packed texts (0 on padding). None: all are real.
          dropout_key: trains with dropout; None runs without.

        Returns:
          [B, L, D] in the compute dtype; finite and meaningless off the mask.

        Raises:
          InputError: L exceeds `config.n_positions`.
        """
        if tokens.shape[1] > self.config.n_positions:
            raise InputError(
                f"{tokens.shape[1]} tokens exceed the model's n_positions = "
                f"{self.config.n_positions}; shorten the sequences."
            )
        embedding.check_trainable(params[self.output])
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        positions = positions_from(mask)
        embed_key, layers_key = (
            (None, None) if dropout_key is None else jax.random.split(dropout_key)
        )
        x = self.embed(params, tokens, positions, dropout_key=embed_key)
        x, _ = self.layers(params["layers"], x, mask, positions, dropout_key=layers_key)
        return self.final(params, x)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of `length` positions for a batch, in the compute dtype."""
        config = self.config
        heads, width = config.num_key_value_heads, config.head_width
        return empty_cache((config.n_layer, batch, heads, length, width), self.dtype)

    def split(self, params: Params, num_layers_unfrozen: int) -> tuple[Params, Params]:
        """(frozen, trained): the upper `num_layers_unfrozen` blocks and the final norm are trained.

        The embeddings, and with them the unembedding, freeze with any layer.
        """
        embedding.check_trainable(params[self.table])
        lower, upper = split_stack(params["layers"], num_layers_unfrozen)
        trained = {"layers": upper, self.final_norm: params[self.final_norm]}
        frozen = {name: part for name, part in params.items() if name not in trained}
        return {**frozen, "layers": lower}, trained

    def merge(self, frozen: Params, trained: Params) -> Params:
        """The parameters whose halves `split` returned."""
        layers = merge_stack(frozen["layers"], trained["layers"])
        return {**frozen, **trained, "layers": layers}
