"""The methods of `interface.Model` that families of stacked blocks share."""

import abc
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.backend import is_on_one_cpu
from rlhf_jax.checks import check_fields
from rlhf_jax.errors import InputError
from rlhf_jax.models import embedding
from rlhf_jax.models.adapters import Adapters, padded_like
from rlhf_jax.models.attention_mask import attention_mask, causal_mask
from rlhf_jax.models.cache import (
    Cache,
    empty_cache,
    fill,
    is_empty,
    prefix_memory,
    visible_in_cache,
    visible_in_slots,
)
from rlhf_jax.models.cudnn_attention import check_head_width
from rlhf_jax.models.dense import rules_beside_kernels
from rlhf_jax.models.interface import Params, positions_from
from rlhf_jax.models.layers import (
    MAX_UNSTACKED_LAYERS,
    Block,
    Context,
    UnstackedLayers,
    decode_stacked,
    decode_unstacked,
    depth,
    layer_at,
    of_kind,
    rematerialized,
    run_layers,
)
from rlhf_jax.models.settings import Attention, Remat, check_cudnn_dtype
from rlhf_jax.parallel.constraints import all_gather
from rlhf_jax.parallel.partition import Rules, path_name

# Factors beside kernels, which decoding leaves in float32.
_KEPT = ("kernel_scale", "lora_scale", "lora_magnitude")


@dataclasses.dataclass(frozen=True)
class StackedModel(abc.ABC):
    """A model of a token embedding, a stack of blocks and a final norm.

    A family adds `init`, `embed`, `final`, `shift_final`, `check_dropout` and `block`, the module
    of one layer. All methods are those of `interface.Model`.

    Args:
      config: sizes, as in `interface.ModelConfig`, and `n_head`, `num_key_value_heads`,
        `head_width` and `tie_word_embeddings`.
      dtype: the compute dtype of products; parameters stay float32, logits come out in float32.
      remat: the values that the backward pass computes again, as in `rematerialized`.
      attention: "blocks", as in `models/attention.py`, or "cudnn", as in
        `models/cudnn_attention.py`; decoding attends as by the first either way.
      generation_config: the object in `generation_config.json`, for exports; its eos_token_id may
        be a list. Models that differ in it alone are equal, as are those that differ in the next.
      stored_types: the types of the tensors in the folder that it was read from, for exports.
      adapters: those in its parameters; None where they have none. `init` makes none.

    Attributes of the class:
      table: the name of the token embedding among the parameters.
      untied: the name of the unembedding where it is not tied.
      final_norm: the name of the final norm.
      norms: a part of the paths of norms, which decoding leaves in float32.
      rules: the partition rules of the parameters without adapters.
      final_has_bias: whether the final norm has a bias.
    """

    config: Any
    dtype: str = "float32"
    remat: Remat = "dots"
    attention: Attention = "blocks"
    generation_config: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )
    stored_types: Mapping[str, str] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )
    adapters: Adapters | None = None

    table: ClassVar[str]
    untied: ClassVar[str] = "lm_head"
    final_norm: ClassVar[str]
    norms: ClassVar[str]
    rules: ClassVar[Rules]
    final_has_bias: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        check_fields("model", self)
        if self.attention == "cudnn":
            check_cudnn_dtype(self.dtype)
            check_head_width(self.config.head_width)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        ids = self.generation_config.get("eos_token_id", self.config.eos_token_id)
        ids = [ids] if isinstance(ids, int) else ids or []
        return tuple(ids)

    @property
    def partition_rules(self) -> Rules:
        return self.rules + rules_beside_kernels(self.rules)

    @property
    @abc.abstractmethod
    def block(self) -> Block: ...

    def context(self, positions: jax.Array, layers: slice) -> Context:
        """The rotations and kinds of some layers, at i32[B, L] positions."""
        return Context()

    @property
    def logit_scale(self) -> float:
        return 1.0

    @property
    def logit_softcap(self) -> float | None:
        return None

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        """Whether each layer attends within the window; () where none does."""
        return ()

    @property
    def window(self) -> int | None:
        """The positions that a sliding layer sees; None where there are none."""
        return None

    @property
    def output(self) -> str:
        """The name of the unembedding among the parameters: the token embedding if it is tied."""
        return self.table if self.config.tie_word_embeddings else self.untied

    @abc.abstractmethod
    def embed(self, params, tokens, positions, *, decode=False, dropout_key=None) -> jax.Array: ...

    @abc.abstractmethod
    def final(self, params, x) -> jax.Array: ...

    def check_mesh(self, mesh: Mesh) -> None:
        parts = mesh.shape["tensor"]
        for name in ("n_head", "num_key_value_heads"):
            if (heads := getattr(self.config, name)) % parts:
                raise InputError(
                    f"The model has {name} = {heads} heads of attention, which are not divisible "
                    f"by mesh.tensor = {parts}; choose a tensor that divides them, or use fsdp "
                    "instead."
                )

    def flops_per_token(self, params: Params, *, unembeds: bool) -> float:
        kernel = "kernel|lora_(start_)?[ab]"
        pattern = rf"(^|/)({kernel}|{self.output}/\w+)$" if unembeds else rf"(^|/)({kernel})$"
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return 2.0 * sum(leaf.size for path, leaf in leaves if re.search(pattern, path_name(path)))

    def layers(
        self,
        stack,
        x,
        mask,
        positions,
        cache=None,
        prefix=None,
        shared=None,
        *,
        dropout_key=None,
        first_layer=None,
    ) -> tuple[jax.Array, Cache | None]:
        others = sum(each is not None for each in (cache, prefix, shared))
        if others > 1 or (others and dropout_key is not None):
            raise ValueError(
                "layers takes a cache, a prefix or a shared prompt, one of the three, and no "
                "dropout with any of them."
            )
        count, shape = depth(stack), x.shape
        first = self.config.n_layer - count if first_layer is None else first_layer
        if prefix is not None:  # [G, K * T, D]
            x = x.reshape(prefix.mask.shape[0], -1, shape[-1])
        positions = positions.reshape(x.shape[:2])
        context = self.context(positions, slice(first, first + count))
        is_sliding = None if context.kinds is None else context.kinds.is_sliding
        if cache is not None and not is_empty(cache):
            if cache.sliding_keys is not None and x.shape[1] > 1:
                return self._decode_by_token(stack, x, mask, positions, cache, first)
            return self._decode(stack, x, mask, context, cache)
        windows = (None,) if context.window is None else (None, context.window)
        masks = [
            attention_mask(mask, prefix, shared, window=window, positions=positions)
            for window in windows
        ]

        def body(x, layer):
            params, past, key, kind = layer
            visible, rotation = of_kind(kind, masks), context.rotation(kind)
            params = all_gather(params, self.dtype, self.partition_rules, is_layer=True)
            rngs = {} if key is None else {"dropout": key}
            x, memory = self.block.apply(
                {"params": params}, x, visible, rotation, past, key is None, rngs=rngs
            )
            return x, memory if cache is not None else None

        past = None if prefix is None else prefix_memory(prefix, is_sliding, context.window)
        keys = None if dropout_key is None else jax.random.split(dropout_key, count)
        beside = past, keys, context.kinds
        x, memory = run_layers(rematerialized(body, self.remat), x, stack, beside)
        if cache is not None:
            cache = fill(cache, memory, mask, is_sliding, context.window)
        return x.reshape(shape), cache

    def _decode(self, stack, x, mask, context, cache) -> tuple[jax.Array, Cache]:
        """Writes L tokens into the cache and attends to it, layer by layer."""
        visible, new_mask = visible_in_cache(cache, causal_mask(mask), mask)
        places = [(cache.length, visible)]
        if (window := context.window) is not None and cache.sliding_keys is not None:
            in_slots = visible_in_slots(visible, cache.length, window)
            places.append((cache.length % window, in_slots))
        decode = decode_unstacked if isinstance(stack, UnstackedLayers) else decode_stacked
        x, memories = decode(self.block.clone(decode=True), stack, x, context, cache, places)
        return x, cache.updated(memories, new_mask, cache.length + x.shape[1])

    def _decode_by_token(self, stack, x, mask, positions, cache, first):
        """`_decode` token by token, since later tokens overwrite slots that earlier ones read."""

        def step(cache, token):
            x, mask, positions = (part[:, None] for part in token)
            x, cache = self.layers(stack, x, mask, positions, cache, first_layer=first)
            return cache, x[:, 0]

        tokens = tuple(jnp.moveaxis(part, 1, 0) for part in (x, mask, positions))
        cache = cache._replace(length=jnp.int32(cache.length))
        cache, x = jax.lax.scan(step, cache, tokens)
        return jnp.moveaxis(x, 0, 1), cache

    def for_decoding(self, params: Params) -> Params:
        """In the compute dtype but for norms; on one CPU unstacked, up to 48 layers.

        A CPU copies each layer out of a stack before it multiplies with it, which for a small batch
        costs as much as the product.
        """
        if isinstance(params["layers"], UnstackedLayers):
            return params

        def cast(path, leaf):
            name = path_name(path)
            is_kept = self.norms in name or name.endswith(_KEPT) or leaf.dtype == jnp.int8
            return leaf if is_kept else leaf.astype(self.dtype)

        params = jax.tree_util.tree_map_with_path(cast, params)
        stack = params["layers"]
        if is_on_one_cpu() and depth(stack) <= MAX_UNSTACKED_LAYERS:
            stack = UnstackedLayers(tuple(layer_at(stack, i) for i in range(depth(stack))))
        return {**params, "layers": stack}

    def without_unembedding(self, params: Params) -> Params:
        return {name: part for name, part in params.items() if name != self.untied}

    def unembedding(self, params: Params) -> jax.Array:
        return params[self.output]["embedding"].astype(self.dtype)

    def logits(self, params: Params, hidden: jax.Array, *, decode: bool = False) -> jax.Array:
        return self.padded_logits(params, hidden, decode=decode)[..., : self.config.vocab_size]

    def padded_logits(
        self, params: Params, hidden: jax.Array, *, decode: bool = False
    ) -> jax.Array:
        name, rules = self.output, self.partition_rules
        logits = embedding.unembed(name, params[name], hidden, self.dtype, rules, decode=decode)
        if self.logit_scale != 1:
            logits *= self.logit_scale
        if (cap := self.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return embedding.mask_padding(logits, self.config.vocab_size)

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        if tokens.shape[1] > self.config.n_positions:
            raise InputError(
                f"{tokens.shape[1]} tokens exceed the model's n_positions = "
                f"{self.config.n_positions}; shorten the sequences."
            )
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        positions = positions_from(mask)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = self.embed(params, tokens, positions, dropout_key=keys[0])
        x, _ = self.layers(params["layers"], x, mask, positions, dropout_key=keys[1])
        return self.final(params, x)

    def init_cache(self, batch: int, length: int) -> Cache:
        config = self.config
        shape = (config.n_layer, batch, config.num_key_value_heads, length, config.head_width)
        return empty_cache(shape, self.dtype, self.is_sliding, self.window)

    def split(self, params: Params, num_layers_unfrozen: int) -> tuple[Params, Params]:
        """The embeddings, and with them the unembedding, freeze with any layer."""
        if isinstance(params["layers"], UnstackedLayers):
            raise ValueError("these parameters are laid out by for_decoding; give those of before.")
        count = depth(params["layers"])
        if not 0 <= num_layers_unfrozen <= count:
            raise InputError(
                f"num_layers_unfrozen must be from 0 to n_layer = {count}, "
                f"but is {num_layers_unfrozen}."
            )
        cut = count - num_layers_unfrozen
        lower, upper = (
            jax.tree.map(lambda leaf, part=part: leaf[part], params["layers"])
            for part in (slice(cut), slice(cut, None))
        )
        if cut == 0:  # no copy
            upper = params["layers"]
        trained = {"layers": upper, self.final_norm: params[self.final_norm]}
        frozen = {name: part for name, part in params.items() if name not in trained}
        return {**frozen, "layers": lower}, trained

    def merge(self, frozen: Params, trained: Params) -> Params:
        lower, stack = frozen["layers"], trained["layers"]
        if depth(lower):
            lower = padded_like(lower, stack)
            stack = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), lower, stack)
        return {**frozen, **trained, "layers": stack}
