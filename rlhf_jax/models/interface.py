"""The protocol of language models: all that the rest of the library uses of them.

An NNX, Equinox or hand-written network fits if it has these methods over a pytree of parameters.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.models.cache import Cache
from rlhf_jax.parallel.partition import Rules

Params = Any


class SharedPrompt(NamedTuple):
    """Sequences of one prompt, then K responses to it that do not see each other.

    Attributes:
      length: P, positions of the prompt; may be 0.
      responses: K, all of the same number of positions.
    """

    length: int
    responses: int


class ModelConfig(Protocol):
    """The sizes and tokens that the rest of the library reads.

    Attributes:
      vocab_size: V.
      n_positions: the maximum length of a sequence.
      n_embd: D.
      n_layer: the number of layers.
      bos_token_id, eos_token_id, pad_token_id: None where the model has none.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def n_positions(self) -> int: ...

    @property
    def n_embd(self) -> int: ...

    @property
    def n_layer(self) -> int: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...


class Model(Protocol):
    """A causal language model over a pytree of parameters. Hashable: a static argument of jit.

    It may have an attribute `no_weight_decay`, a tuple of regular expressions over the end of a
    parameter's path, as in `partition_rules`: those do not decay (`training.make_optimizer`).
    """

    def __hash__(self) -> int: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The object in `generation_config.json`, for exports; {} without the file."""
        ...

    @property
    def stored_types(self) -> Mapping[str, str]:
        """The type of each tensor in the folder that it was read from, for exports; {} of none."""
        ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: EOS, and perhaps further ones."""
        ...

    @property
    def partition_rules(self) -> Rules:
        """Of the parameters, for `parallel.tree_shardings`; arrays of one axis need none."""
        ...

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises an InputError if the model cannot be split over the mesh, e.g. its heads."""
        ...

    def check_dropout(self) -> None:
        """Raises an InputError if the model cannot train with the dropout of its configuration."""
        ...

    def flops_per_token(self, params: Params, *, unembeds: bool) -> float:
        """FLOPs of a forward pass for one token, of products with parameters alone.

            2 * (the number of parameters in matrices)

        Position embeddings, biases, norms and attention do not count.

        Args:
          params: a tree that contains parameters of the model, or a half of them; shapes suffice.
          unembeds: whether logits are computed; the embedding counts then, if it is in `params`.
        """
        ...

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        ...

    def embed(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        decode: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Input of the first layer, [B, L, D], of i32[B, L] tokens at i32[B, L] positions.

        Args:
          decode: whether these are single tokens in decoding, where parameters stay split over
            `fsdp` and activations move. The values are the same.
          dropout_key: trains with dropout; None runs without.
        """
        ...

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
        """Runs a stack of layers of any length over [B, L, D].

        Args:
          stack: parameters with the layers on axis 0, as in `params["layers"]`.
          x: [B, L, D].
          mask: bool[B, L], or i32[B, L] segments (0 on padding; equal numbers see each other).
          positions: i32[B, L].
          cache: past tokens of the same B sequences, read and then extended by these L: a step of
            decoding. An empty one is only filled, and may have more layers than the stack.
          prefix: past tokens of B / K left-padded prompts, read only; sequences b * K to
            b * K + K - 1 follow prompt b.
          shared: how the L positions are divided where each sequence is a prompt with several
            responses that all see it; None for one text, or several packed ones.
          dropout_key: trains with dropout; None runs without.
          first_layer: the index of the lowest layer of the stack; None for a stack that reaches the
            last layer of the model.

        Returns:
          [B, L, D] before the final layer norm, and the extended cache (None without a cache).
        """
        ...

    def final(self, params: Params, x: jax.Array) -> jax.Array:
        """The final norm, [..., D] -> [..., D]."""
        ...

    @property
    def final_has_bias(self) -> bool:
        """Whether there is a `shift_final`: not where the final norm has no bias."""
        ...

    def shift_final(self, params: Params, shift: jax.Array) -> Params:
        """Parameters, perhaps the trained half alone, under which `final` adds f32[D] shift."""
        ...

    def without_unembedding(self, params: Params) -> Params:
        """Parameters, perhaps a half, without an unembedding of their own.

        A reward model computes no logits. All methods but those of logits accept the result.
        """
        ...

    def unembedding(self, params: Params) -> jax.Array:
        """[Vp, D] in the compute dtype, split over the mesh as the parameter is.

        One vector for each token; those from `config.vocab_size` on are padding.
        """
        ...

    @property
    def logit_scale(self) -> float:
        """The factor of the products of hidden states with the unembedding; 1.0 for none."""
        ...

    @property
    def logit_softcap(self) -> float | None:
        """c in c * tanh(x / c), which bounds the scaled products; None where logits are these."""
        ...

    def logits(self, params: Params, hidden: jax.Array, *, decode: bool = False) -> jax.Array:
        """f32[..., V] of [..., D] hidden states, V = `config.vocab_size`. `decode`: see `embed`."""
        ...

    def padded_logits(
        self, params: Params, hidden: jax.Array, *, decode: bool = False
    ) -> jax.Array:
        """f32[..., Vp], Vp >= V: `logits` followed by -inf, which saves a copy. Vp may be V."""
        ...

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
          tokens: i32[B, L], L at most `config.n_positions`; else an InputError is raised.
          mask: bool[B, L], True on real tokens, padded left or right; or i32[B, L] segments of
            packed texts (0 on padding). None: all are real.
          dropout_key: trains with dropout; None runs without.

        Returns:
          [B, L, D] in the compute dtype; finite and meaningless off the mask.
        """
        ...

    def for_decoding(self, params: Params) -> Params:
        """Parameters in the layout that is fastest for single tokens; perhaps the argument itself.

        Only `embed`, `layers`, `final`, `padded_logits` and this function accept the result.
        """
        ...

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of `length` positions for a batch, fewer in layers with a window."""
        ...

    def split(self, params: Params, num_layers_unfrozen: int) -> tuple[Params, Params]:
        """(frozen, trained) halves: the lower layers with the embeddings, and the upper layers.

        The frozen half has the parameters of `embed` and `unembedding`, the trained one those of
        `final`, and both have "layers", perhaps none. The number is from 0 to `config.n_layer`.
        """
        ...

    def merge(self, frozen: Params, trained: Params) -> Params:
        """The full parameters whose halves `split` returned."""
        ...


def positions_from(mask: jax.Array) -> jax.Array:
    """Position ids that count real tokens, so that padding moves nothing.

    Args:
      mask: bool[B, L], True on real tokens, or i32[B, L] segments, contiguous and 0 on padding.

    Returns:
      i32[B, L]: the number of real tokens before each one, within its segment; off the mask an
      arbitrary number in range.
    """
    if mask.dtype == bool:
        return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    index = jnp.arange(mask.shape[1], dtype=jnp.int32)
    starts = mask != jnp.pad(mask[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
