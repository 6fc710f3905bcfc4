"""What the rest of the library asks of a language model: the one door to `models/`.

`rollout/` and `training/` receive an object with the methods of `Model` and never import a model
family, so that an NNX, Equinox or hand-written network fits by offering these few functions over a
pytree of parameters.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Params = Any


class Cache(NamedTuple):
    """Keys and values of past tokens, for all layers.

    Attributes:
      keys, values: dtype[N, B, H, C, D / H], N layers, C positions; 0 where nothing was written.
        Behind layers that `for_decoding` gave they may lie otherwise.
      mask: bool[B, C], True where a real token was written.
      length: the number of positions written, the same for every row (rows are left-padded). A
        Python 0 says at trace time that nothing is there to be read.
    """

    keys: Any
    values: Any
    mask: jax.Array
    length: jax.Array | int


class SharedPrompt(NamedTuple):
    """Rows that begin with a prompt, behind which K responses stand that do not see each other.

    Attributes:
      length: P, positions of the prompt; may be 0.
      responses: K, each of as many positions as the others.
    """

    length: int
    responses: int


class ModelConfig(Protocol):
    """The sizes that the rest of the library reads.

    Attributes:
      vocab_size: V.
      n_positions: the most positions that a row may have.
      n_embd: D.
      n_layer: layers of a whole stack.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def n_positions(self) -> int: ...

    @property
    def n_embd(self) -> int: ...

    @property
    def n_layer(self) -> int: ...


class Model(Protocol):
    """A causal language model over a pytree of parameters. Hashable: a static argument of jit."""

    @property
    def config(self) -> ModelConfig: ...

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        ...

    def embed(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Input of the first layer, [B, L, D], of i32[B, L] tokens at i32[B, L] positions."""
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
    ) -> tuple[jax.Array, Cache | None]:
        """Runs a stack of layers of any length over [B, L, D].

        Args:
          stack: parameters with the layers on axis 0, as in `params["layers"]`.
          x: [B, L, D].
          mask: bool[B, L], or i32[B, L] segments (0 on padding; equal numbers see each other).
          positions: i32[B, L].
          cache: past tokens of the same B rows, to be read and then extended by these L. One that
            nothing was written to may have more layers than the stack.
          prefix: past tokens of B / K rows, read only: its row b serves rows b * K and on, K
            of them.
          shared: what the L positions hold where each row is a prompt with several responses, which
            all see it; None where a row is one text, or one after the other.
          dropout_key: trains with dropout; None runs without.

        Returns:
          [B, L, D] before the final layer norm, and the extended cache (None without a cache).
        """
        ...

    def final(self, params: Params, x: jax.Array) -> jax.Array:
        """The final layer norm, [..., D] -> [..., D]."""
        ...

    def shift_final(self, params: Params, shift: jax.Array) -> Params:
        """Parameters under which `final` gives its result + f32[D] shift.

        `params` may be the trained half that `split` gives. A family whose final norm has nothing
        to add raises an InputError.
        """
        ...

    def unembedding(self, params: Params) -> jax.Array:
        """[Vp, D], one row for each token; rows from `config.vocab_size` on are padding."""
        ...

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """f32[..., V] of [..., D] hidden states, V = `config.vocab_size`."""
        ...

    def padded_logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """f32[..., Vp], Vp >= V: `logits` with -inf behind them, where that spares a copy.

        All steps and `generate` call this one. It may be `logits` itself: Vp is V then.
        """
        ...

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """[B, L, D] after the final layer norm; left and right padding are both allowed."""
        ...

    def for_decoding(self, params: Params) -> Params:
        """Parameters as single tokens read them fastest: once, before the prompts.

        `embed`, `layers`, `final`, `padded_logits` and this function itself take what it gives, and
        nothing else does. It may give back what it got.
        """
        ...

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of `length` positions for `batch` rows."""
        ...

    def split(self, params: Params, num_layers_unfrozen: int) -> tuple[Params, Params]:
        """(frozen, trained) halves: the lower layers with the embeddings, and the upper layers.

        The frozen half has all that `embed` and `unembedding` read, the trained one what `final`
        reads, and both have "layers", of any number. Raises an InputError where the number is not
        from 0 to `config.n_layer`.
        """
        ...

    def merge(self, frozen: Params, trained: Params) -> Params:
        """What `split` took apart, whole again."""
        ...


def positions_from(mask: jax.Array) -> jax.Array:
    """Position ids that count real tokens, so that padding moves nothing.

    Args:
      mask: bool[B, L], True on real tokens, or i32[B, L] segments, contiguous and 0 on padding.

    Returns:
      i32[B, L]: the number of real tokens before each one, within its segment; off the mask some
      number in range.
    """
    if mask.dtype == bool:
        return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    index = jnp.arange(mask.shape[1], dtype=jnp.int32)
    starts = mask != jnp.pad(mask[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
