"""GPT-2 (Radford et al. 2019) as a Linen block scanned over stacked parameters.

Pre-layer-norm blocks with a tanh-approximated GELU, learned positions, and an unembedding tied to
the token embedding. The vocabulary is padded inside to a multiple of 128 (50257 -> 50304), so that
its axis divides over devices and tiles; the padding never leaves `logits`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.cudnn_attention import Attention, check_attention, check_dtype, check_heads
from rlhf_jax.models.dropout import drop, start_dropout
from rlhf_jax.models.gpt2_block import ACTIVATIONS, AttentionMask, Block, layer_norm
from rlhf_jax.models.gpt2_decoding import (
    UnstackedLayers,
    check_trainable,
    decode_unstacked,
    embedded,
    for_decoding,
    run_layers,
    unembedded,
)
from rlhf_jax.models.interface import Cache, Params, SharedPrompt, positions_from
from rlhf_jax.models.remat import Remat, check_remat, rematerialized
from rlhf_jax.parallel.constraints import (
    all_gather,
    constrain_batch,
    constrain_batch_over_data,
    constrain_cache,
)

VOCABULARY_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes and constants of a GPT-2, under Hugging Face's names. The default is GPT-2 small."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if self.n_embd % self.n_head:
            raise InputError(
                f"n_embd must be a multiple of n_head, but {self.n_embd} is none of {self.n_head}."
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"{name} must be at least 0 and below 1, but is {getattr(self, name)}."
                )
        if self.activation_function not in ACTIVATIONS:
            raise InputError(
                f"activation_function {self.activation_function!r} is unknown; "
                f"known are {', '.join(sorted(ACTIVATIONS))}."
            )

    @property
    def inner_width(self) -> int:
        """Width of the hidden layer of the MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclasses.dataclass(frozen=True)
class GPT2:
    """GPT-2 as pure functions over a pytree of parameters (see `models/interface.py`).

    Args:
      config: the sizes.
      dtype: what products are computed in; parameters stay float32, logits come out in float32.
      remat: what the backward pass computes again, as in `models/remat.py`; decoding has none.
      attention: "blocks", as in `models/attention.py`, or "cudnn", as in
        `models/cudnn_attention.py`; single tokens of decoding attend as by the first either way.

    The parameters are `{"wte": {"embedding": [Vp, D]}, "wpe": {"embedding": [n_positions, D]},
    "layers": blocks stacked on axis 0, "ln_f": {"scale": [D], "bias": [D]}}`.

    >>> model = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    >>> params = model.init(jax.random.key(0))
    >>> hidden = model.hidden(params, jnp.array([[1, 2, 3]]))
    >>> model.logits(params, hidden).shape
    (1, 3, 10)
    """

    config: GPT2Config
    dtype: str = "float32"
    remat: Remat = "dots"
    attention: Attention = "blocks"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        check_remat("remat", self.remat)
        check_attention("attention", self.attention)
        if self.attention == "cudnn":
            check_dtype(self.dtype)
            check_heads(self.config.n_embd // self.config.n_head)

    @property
    def _block(self) -> Block:
        return Block(self.config, self.dtype, attention=self.attention)

    def init(self, key: jax.Array) -> Params:
        """Float32 parameters: N(0, initializer_range), residual projections over sqrt(2 N)."""
        config = self.config
        wte_key, wpe_key, *keys = jax.random.split(key, 2 + config.n_layer)
        normal = nn.initializers.normal(config.initializer_range)
        wte = normal(wte_key, (config.padded_vocab_size, config.n_embd))
        real = jnp.arange(config.padded_vocab_size)[:, None] < config.vocab_size
        x, sight = jnp.zeros((1, 1, config.n_embd)), AttentionMask(jnp.ones((1, 1, 1, 1), bool))
        block = Block(config, self.dtype)  # whose parameters no attention changes
        layers = jax.vmap(lambda key: block.init(key, x, sight)["params"])(jnp.stack(keys))
        width = (config.n_embd,)
        return {
            "wte": {"embedding": jnp.where(real, wte, 0.0)},
            "wpe": {"embedding": normal(wpe_key, (config.n_positions, config.n_embd))},
            "layers": layers,
            "ln_f": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        }

    def embed(self, params, tokens, positions, *, dropout_key=None):
        """Token plus position embedding, [B, L, D] in the compute dtype."""
        tables = {name: params[name] for name in ("wte", "wpe")}
        is_decoding = tokens.shape[1] == 1  # see Block
        tables = tables if is_decoding else all_gather(tables, self.dtype)
        x = embedded(tables["wte"], tokens).astype(self.dtype)
        x += embedded(tables["wpe"], positions).astype(self.dtype)
        x = constrain_batch_over_data(x, last="fsdp") if is_decoding else constrain_batch(x)
        if dropout_key is None or not self.config.embd_pdrop:
            return x
        return drop(start_dropout(dropout_key, self.config.embd_pdrop), x)

    def layers(
        self,
        stack,
        x,
        mask,
        positions,
        cache=None,
        prefix=None,
        shared: SharedPrompt | None = None,
        *,
        dropout_key=None,
    ):
        """Runs a stack of blocks; see `interface.Model.layers`. GPT-2 reads no `positions` here."""
        if sum(x is not None for x in (cache, prefix, shared)) > 1 or (
            dropout_key is not None and (cache, prefix, shared) != (None, None, None)
        ):
            raise ValueError(
                "layers takes a cache, a prefix or a shared prompt, one of the three, and no "
                "dropout with any of them."
            )
        if cache is not None and not _is_fresh(cache):
            return self._extend(stack, x, mask, cache)
        shape = x.shape
        if prefix is not None:  # [G, K * T, D]
            x = x.reshape(prefix.mask.shape[0], -1, shape[-1])
        sight = _sight(mask, prefix, shared)

        def body(x, layer):
            params, past, key = layer
            params = all_gather(params, self.dtype, is_layer=True)
            rngs = {} if key is None else {"dropout": key}
            x, memory = self._block.apply(
                {"params": params}, x, sight, past, key is None, rngs=rngs
            )
            return x, memory if cache is not None else None

        past = None if prefix is None else (prefix.keys, prefix.values)
        keys = None if dropout_key is None else jax.random.split(dropout_key, _depth(stack))
        x, memory = run_layers(rematerialized(body, self.remat), x, stack, (past, keys))
        return x.reshape(shape), None if cache is None else _fill(cache, memory, mask)

    def for_decoding(self, params):
        """Parameters as `gpt2_decoding.for_decoding` lays them out."""
        return for_decoding(params, self.dtype)

    def _extend(self, stack, x, mask, cache):
        """One step of decoding: writes these L tokens into the cache, and attends to it."""
        visible, new_mask = _visible_in_cache(cache, mask)
        block = Block(self.config, self.dtype, is_decoding=True)

        if isinstance(stack, UnstackedLayers):
            x, memory = decode_unstacked(block, stack, x, visible, cache)
            return x, Cache(*memory, mask=new_mask, length=cache.length + x.shape[1])

        def body(carry, params):
            x, keys, values, i = carry
            params = {"params": params}
            q, *new = block.apply(params, x, method="heads")
            # Written first and then read: XLA copies a cache that is read and then written.
            keys, values = (
                jax.lax.dynamic_update_slice(whole, part[None], (i, 0, 0, cache.length, 0))
                for whole, part in zip((keys, values), new, strict=True)
            )
            past = (jax.lax.dynamic_index_in_dim(m, i, keepdims=False) for m in (keys, values))
            x = block.apply(params, x, q, *past, visible, method="decode")
            return (x, keys, values, i + 1), None

        past = (constrain_cache(cache.keys), constrain_cache(cache.values))
        (x, keys, values, _), _ = jax.lax.scan(body, (x, *past, 0), stack)
        return x, Cache(keys, values, new_mask, cache.length + x.shape[1])

    def final(self, params, x):
        """The final layer norm, in the compute dtype."""
        return layer_norm(self.config, self.dtype).apply({"params": params["ln_f"]}, x)

    def shift_final(self, params, shift):
        """Parameters whose final layer norm has that much more of a bias; nothing else changes."""
        norm = params["ln_f"]
        return {**params, "ln_f": {**norm, "bias": norm["bias"] + shift}}

    def unembedding(self, params):
        """[Vp, D], the token embedding."""
        check_trainable(params)
        return params["wte"]["embedding"]

    def logits(self, params, hidden):
        """f32[..., V] logits of [..., D] hidden states; of one state a row as in decoding."""
        return self._products(params, hidden)[..., : self.config.vocab_size]

    def padded_logits(self, params, hidden):
        """f32[..., Vp], -inf from V on. What is cut off costs a copy, forwards and backwards."""
        logits = self._products(params, hidden)
        is_token = jnp.arange(logits.shape[-1]) < self.config.vocab_size
        # Added and not selected: the sum becomes part of the product.
        return logits + jnp.where(is_token, 0.0, -jnp.inf)

    def _products(self, params, hidden):
        """f32[..., Vp] products with all rows of the embedding."""
        table, is_decoding = {"wte": params["wte"]}, hidden.ndim == 2
        hidden = constrain_batch_over_data(hidden, last="fsdp") if is_decoding else hidden
        table = table if is_decoding else all_gather(table, self.dtype)
        logits = unembedded(table["wte"], hidden)
        logits = constrain_batch_over_data(logits, last="tensor") if is_decoding else logits
        return constrain_batch(logits, last="tensor")

    def hidden(self, params, tokens, mask=None, *, dropout_key=None):
        """Hidden states after the final layer norm.

        Args:
          params: as made by `init`.
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
                f"{self.config.n_positions}; shorten the rows."
            )
        check_trainable(params)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        positions = positions_from(mask)
        embed_key, layers_key = (
            (None, None) if dropout_key is None else jax.random.split(dropout_key)
        )
        x = self.embed(params, tokens, positions, dropout_key=embed_key)
        x, _ = self.layers(params["layers"], x, mask, positions, dropout_key=layers_key)
        return self.final(params, x)

    def init_cache(self, batch, length):
        """An empty cache of `length` positions for `batch` rows, in the compute dtype."""
        config = self.config
        shape = (config.n_layer, batch, config.n_head, length, config.n_embd // config.n_head)
        keys = jnp.zeros(shape, self.dtype)
        return Cache(keys, jnp.zeros_like(keys), jnp.zeros((batch, length), bool), 0)

    def split(self, params, num_layers_unfrozen):
        """(frozen, trained): the upper `num_layers_unfrozen` blocks and `ln_f` are trained.

        The embeddings, and with them the unembedding, freeze with any layer.
        """
        check_trainable(params)
        if not 0 <= num_layers_unfrozen <= self.config.n_layer:
            raise InputError(
                f"num_layers_unfrozen must be from 0 to n_layer = {self.config.n_layer}, "
                f"but is {num_layers_unfrozen}."
            )
        cut = self.config.n_layer - num_layers_unfrozen
        lower = jax.tree.map(lambda p: p[:cut], params["layers"])
        upper = jax.tree.map(lambda p: p[cut:], params["layers"])
        frozen = {"wte": params["wte"], "wpe": params["wpe"], "layers": lower}
        return frozen, {"layers": upper, "ln_f": params["ln_f"]}

    def merge(self, frozen, trained):
        """The parameters whose halves `split` gave."""
        stack = lambda lower, upper: jnp.concatenate([lower, upper])  # noqa: E731
        layers = jax.tree.map(stack, frozen["layers"], trained["layers"])
        return {**frozen, **trained, "layers": layers}


def _depth(stack: Params) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def _is_fresh(cache: Cache) -> bool:
    """Whether it is known while tracing that nothing was written yet."""
    return isinstance(cache.length, int) and cache.length == 0


def _own_visible(mask: jax.Array) -> jax.Array:
    """bool[..., L, L]: which of the L tokens each one sees: real, of its segment, not after it."""
    segments = mask.astype(jnp.int32)
    same = (segments[..., :, None] == segments[..., None, :]) & (segments[..., None, :] > 0)
    index = jnp.arange(mask.shape[-1])
    return same & (index[:, None] >= index[None, :])


def _sight(mask: jax.Array, prefix: Cache | None, shared: SharedPrompt | None) -> AttentionMask:
    """Who sees whom, of rows with a mask [B, S], or [G * K, T] behind a prefix."""
    if prefix is not None:
        own = mask.reshape(prefix.mask.shape[0], -1, mask.shape[1])
        return AttentionMask(_own_visible(own), past=prefix.mask)
    if shared is None:
        return AttentionMask(_own_visible(mask)[:, None])
    prompt, own = mask[:, : shared.length], mask[:, shared.length :]
    own = _own_visible(own.reshape(mask.shape[0], shared.responses, -1))
    return AttentionMask(own, _own_visible(prompt), prompt) if shared.length else AttentionMask(own)


def _visible_in_cache(cache: Cache, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(bool[B, L, C], bool[B, C]): what L new tokens see of the cache, and its mask with them."""
    shape = (*mask.shape, cache.mask.shape[1])
    written = jnp.arange(shape[2]) < cache.length
    before = jnp.broadcast_to((cache.mask & written)[:, None], shape)
    visible = jax.lax.dynamic_update_slice(before, _own_visible(mask), (0, 0, cache.length))
    new_mask = jax.lax.dynamic_update_slice(cache.mask, mask.astype(bool), (0, cache.length))
    return visible, new_mask


def _fill(cache: Cache, memory: tuple[jax.Array, jax.Array], mask: jax.Array) -> Cache:
    """A fresh cache with the keys and values [N, B, H, L, d] of its first L positions."""
    missing = cache.mask.shape[1] - mask.shape[1]

    def fill(part):
        room = [(0, 0)] * (part.ndim - 2) + [(0, missing), (0, 0)]
        return jnp.pad(part, room)

    keys, values = jax.tree.map(fill, memory)
    if not isinstance(keys, tuple):
        keys, values = constrain_cache(keys), constrain_cache(values)
    written = jnp.pad(mask.astype(bool), ((0, 0), (0, missing)))
    return Cache(keys, values, written, mask.shape[1])
