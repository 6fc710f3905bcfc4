"""GPT-2 (Radford et al. 2019) as a Linen block scanned over stacked parameters.

Pre-layer-norm blocks with a tanh-approximated GELU, learned positions, and an unembedding tied to
the token embedding. The vocabulary is padded inside to a multiple of 128 (50257 -> 50304), so that
its axis divides over devices and tiles; the padding never leaves `logits`.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Cache, Params, positions_from
from rlhf_jax.models.remat import Remat, check_remat, rematerialized
from rlhf_jax.parallel.constraints import collect, join_rows, split_cache, split_rows

VOCABULARY_MULTIPLE = 128

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}


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
        if self.activation_function not in _ACTIVATIONS:
            raise InputError(
                f"activation_function {self.activation_function!r} is unknown; "
                f"known are {', '.join(sorted(_ACTIVATIONS))}."
            )

    @property
    def inner_width(self) -> int:
        """Width of the hidden layer of the MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class Block(nn.Module):
    """One transformer block.

    Its call takes `x` [B, L, D], `visible` bool[B, L, L] and optionally a past of B / K rows (keys
    and values [B / K, C, H, D / H], and what each of the L tokens sees of them, bool[B, L, C]), and
    returns (x, (keys, values)) with keys and values [B, L, H, D / H] of these tokens.

    In decoding, one token of each row meets all parameters: these stay where they are, and the rows
    travel (Pope et al. 2022, section 3.2: weight-stationary layouts; arXiv:2211.05102).
    """

    config: GPT2Config
    dtype: str
    is_decoding: bool = False

    @nn.compact
    def __call__(self, x, visible, past=None, deterministic=True):
        config = self.config
        attended, memory = self._attention(self._norm("ln_1", x), visible, past, deterministic)
        x = self._place(x + nn.Dropout(config.resid_pdrop)(attended, deterministic))
        mlp = _MLP(config, self.dtype, self.is_decoding, name="mlp")
        h = mlp(self._norm("ln_2", x))
        return self._place(x + nn.Dropout(config.resid_pdrop)(h, deterministic)), memory

    def _norm(self, name, x):
        return self._place(_layer_norm(self.config, self.dtype, name)(x))

    def _place(self, x):
        return join_rows(x, last="fsdp") if self.is_decoding else split_rows(x)

    def _attention(self, x, visible, past, deterministic):
        attention = _Attention(self.config, self.dtype, self.is_decoding, name="attn")
        return attention(x, visible, past, deterministic)


class _Attention(nn.Module):
    config: GPT2Config
    dtype: str
    is_decoding: bool

    @nn.compact
    def __call__(self, x, visible, past, deterministic):
        config, (batch, length, width) = self.config, x.shape
        # [D, 3, D]: what splits the last axis over devices gives each the same heads of all three.
        qkv = _dense(config, self.dtype, (3, width), "c_attn")(x)
        qkv = join_rows(qkv, last="tensor") if self.is_decoding else qkv
        qkv = split_rows(qkv, last="tensor")
        q, k, v = (qkv[:, :, i].reshape(batch, length, config.n_head, -1) for i in range(3))
        q = q * np.asarray(q.shape[-1] ** -0.5, q.dtype)
        logits = [_masked_logits("blhd,bmhd->bhlm", q, k, visible)]
        if past is not None:
            past_keys, past_values, past_visible = past
            grouped = q.reshape(past_keys.shape[0], -1, *q.shape[1:])  # [B / K, K, L, H, D / H]
            past_logits = _past_logits(grouped, past_keys, past_visible)
            logits.insert(0, past_logits)
        weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(q.dtype)
        weights = nn.Dropout(config.attn_pdrop)(weights, deterministic)
        out = jnp.einsum("bhlm,bmhd->blhd", weights[..., -length:], v)
        if past is not None:
            share = weights[..., :-length].reshape(
                past_values.shape[0], -1, *weights.shape[1:3], past_values.shape[1]
            )
            out += jnp.einsum("gkhlm,gmhd->gklhd", share, past_values).reshape(out.shape)
        out = split_rows(out.reshape(batch, length, width), last="tensor")
        out = join_rows(out, last="tensor") if self.is_decoding else out
        scale = (2 * config.n_layer) ** -0.5  # residual branches add up: Radford et al. 2019, 2.3
        return _dense(config, self.dtype, width, "c_proj", scale)(out), (k, v)


class _MLP(nn.Module):
    config: GPT2Config
    dtype: str
    is_decoding: bool

    @nn.compact
    def __call__(self, x):
        config = self.config
        h = _dense(config, self.dtype, config.inner_width, "c_fc")(x)
        h = (join_rows if self.is_decoding else split_rows)(h, last="tensor")
        h = _ACTIVATIONS[config.activation_function](h)
        scale = (2 * config.n_layer) ** -0.5
        return _dense(config, self.dtype, config.n_embd, "c_proj", scale)(h)


def _dense(
    config: GPT2Config,
    dtype: str,
    features: int | tuple[int, ...],
    name: str,
    scale: float = 1.0,
):
    kernel_init = nn.initializers.normal(config.initializer_range * scale)
    return nn.DenseGeneral(features, dtype=jnp.dtype(dtype), kernel_init=kernel_init, name=name)


def _layer_norm(config: GPT2Config, dtype: str, name: str | None = None) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels where a mean is large beside its deviation.
    return nn.LayerNorm(
        epsilon=config.layer_norm_epsilon,
        dtype=jnp.dtype(dtype),
        use_fast_variance=False,
        name=name,
    )


def _masked_logits(subscripts, q, k, visible):
    """f32[B, H, L, M] attention logits; a finite minimum, so that a row of padding gives no NaN."""
    logits = jnp.einsum(subscripts, q, k, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None], logits, jnp.finfo(jnp.float32).min)


def _past_logits(grouped, keys, visible):
    """f32[B, H, L, C] logits of [B / K, K, L, H, d] queries on [B / K, C, H, d] past keys."""
    logits = jnp.einsum("gklhd,gmhd->gkhlm", grouped, keys, preferred_element_type=jnp.float32)
    logits = logits.reshape(-1, *logits.shape[2:])
    return jnp.where(visible[:, None], logits, jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class GPT2:
    """GPT-2 as pure functions over a pytree of parameters (see `models/interface.py`).

    Args:
      config: the sizes.
      dtype: what products are computed in; parameters stay float32, logits come out in float32.
      remat: what the backward pass computes again, as in `models/remat.py`; decoding has none.

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
    remat: Remat = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        check_remat("remat", self.remat)

    @property
    def _block(self) -> Block:
        return Block(self.config, self.dtype)

    def init(self, key: jax.Array) -> Params:
        """Float32 parameters: N(0, initializer_range), residual projections over sqrt(2 N)."""
        config = self.config
        wte_key, wpe_key, *keys = jax.random.split(key, 2 + config.n_layer)
        normal = nn.initializers.normal(config.initializer_range)
        wte = normal(wte_key, (config.padded_vocab_size, config.n_embd))
        real = jnp.arange(config.padded_vocab_size)[:, None] < config.vocab_size
        x, visible = jnp.zeros((1, 1, config.n_embd)), jnp.ones((1, 1, 1), bool)
        layers = jax.vmap(lambda key: self._block.init(key, x, visible)["params"])(jnp.stack(keys))
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
        tables = tables if is_decoding else collect(tables, self.dtype)
        wte, wpe = tables["wte"]["embedding"], tables["wpe"]["embedding"]
        x = jnp.take(wte, tokens, axis=0, mode="clip").astype(self.dtype)
        x += jnp.take(wpe, positions, axis=0, mode="clip").astype(self.dtype)
        x = join_rows(x, last="fsdp") if is_decoding else split_rows(x)
        if dropout_key is None:
            return x
        return nn.Dropout(self.config.embd_pdrop).apply(
            {}, x, deterministic=False, rngs={"dropout": dropout_key}
        )

    def layers(self, stack, x, mask, positions, cache=None, prefix=None, *, dropout_key=None):
        """Runs a stack of blocks; see `interface.Model.layers`. GPT-2 reads no `positions` here."""
        if cache is not None and (prefix is not None or dropout_key is not None):
            raise ValueError(
                "layers takes a cache or a prefix, not both, and no dropout with a cache."
            )
        visible = _own_visible(mask)
        if cache is not None and not _is_fresh(cache):
            return self._extend(stack, x, mask, visible, cache)
        past_visible = None
        if prefix is not None:
            past_visible = jnp.repeat(prefix.mask, x.shape[0] // prefix.mask.shape[0], axis=0)
            past_visible = jnp.broadcast_to(
                past_visible[:, None], (*x.shape[:2], past_visible.shape[1])
            )

        def body(x, layer):
            params, past, key = layer
            params = collect(params, self.dtype, is_layer=True)
            past = None if past is None else (*past, past_visible)
            rngs = {} if key is None else {"dropout": key}
            x, memory = self._block.apply(
                {"params": params}, x, visible, past, key is None, rngs=rngs
            )
            return x, memory if cache is not None else None

        past = None if prefix is None else (prefix.keys, prefix.values)
        keys = None if dropout_key is None else jax.random.split(dropout_key, _depth(stack))
        x, memory = jax.lax.scan(rematerialized(body, self.remat), x, (stack, past, keys))
        return x, None if cache is None else _fill(cache, memory, mask)

    def _extend(self, stack, x, mask, visible, cache):
        """One step of decoding: attends to the cache and writes these L tokens behind it."""
        length = x.shape[1]
        written = jnp.arange(cache.mask.shape[1]) < cache.length
        past_visible = jnp.broadcast_to(
            (cache.mask & written)[:, None], (*x.shape[:2], cache.mask.shape[1])
        )

        # Keys and values travel in the carry: XLA then writes one position in place, where scanned
        # outputs would copy the whole cache for each token.
        def body(carry, layer):
            x, keys, values, i = carry
            past = (
                *(jax.lax.dynamic_index_in_dim(m, i, keepdims=False) for m in (keys, values)),
                past_visible,
            )
            x, new = block.apply({"params": layer}, x, visible, past)
            at = (i, 0, cache.length, 0, 0)
            keys, values = (
                jax.lax.dynamic_update_slice(whole, part[None], at)
                for whole, part in zip((keys, values), new, strict=True)
            )
            return (x, keys, values, i + 1), None

        block = Block(self.config, self.dtype, is_decoding=True)
        past = (split_cache(cache.keys), split_cache(cache.values))
        (x, keys, values, _), _ = jax.lax.scan(body, (x, *past, 0), stack)
        new_mask = jax.lax.dynamic_update_slice(cache.mask, mask.astype(bool), (0, cache.length))
        return x, Cache(keys, values, new_mask, cache.length + length)

    def final(self, params, x):
        """The final layer norm, in the compute dtype."""
        return _layer_norm(self.config, self.dtype).apply({"params": params["ln_f"]}, x)

    def shift_final(self, params, shift):
        """Parameters whose final layer norm has that much more of a bias; nothing else changes."""
        norm = params["ln_f"]
        return {**params, "ln_f": {**norm, "bias": norm["bias"] + shift}}

    def unembedding(self, params):
        """[Vp, D], the token embedding."""
        return params["wte"]["embedding"]

    def logits(self, params, hidden):
        """f32[..., V] logits of [..., D] hidden states; of one state a row as in decoding."""
        table, is_decoding = {"wte": params["wte"]}, hidden.ndim == 2
        hidden = join_rows(hidden, last="fsdp") if is_decoding else hidden
        table = table if is_decoding else collect(table, self.dtype)
        table = table["wte"]["embedding"].astype(hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        logits = join_rows(logits, last="tensor") if is_decoding else logits
        return split_rows(logits, last="tensor")[..., : self.config.vocab_size]

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
        shape = (config.n_layer, batch, length, config.n_head, config.n_embd // config.n_head)
        keys = jnp.zeros(shape, self.dtype)
        return Cache(keys, jnp.zeros_like(keys), jnp.zeros((batch, length), bool), 0)

    def split(self, params, num_layers_unfrozen):
        """(frozen, trained): the upper `num_layers_unfrozen` blocks and `ln_f` are trained.

        The embeddings, and with them the unembedding, freeze with any layer.
        """
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
    """bool[B, L, L]: which of the L tokens each one sees: real, of its segment, not after it."""
    segments = mask.astype(jnp.int32)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    index = jnp.arange(mask.shape[1])
    return same & (index[:, None] >= index[None, :])


def _fill(cache: Cache, memory: tuple[jax.Array, jax.Array], mask: jax.Array) -> Cache:
    """A fresh cache with the keys and values [N, B, L, H, d] of its first L positions."""
    missing = cache.mask.shape[1] - mask.shape[1]
    padding = ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0))
    keys, values = (split_cache(jnp.pad(m, padding)) for m in memory)
    written = jnp.pad(mask.astype(bool), ((0, 0), (0, missing)))
    return Cache(keys, values, written, mask.shape[1])
