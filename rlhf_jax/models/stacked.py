"""The methods of `interface.Model` that families of stacked blocks share.

Layers are parameters stacked on axis 0 and scanned; in decoding on one CPU they are unstacked.
"""

import abc
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.backend import is_on_one_cpu
from rlhf_jax.checks import check_fields
from rlhf_jax.errors import InputError
from rlhf_jax.models import embedding
from rlhf_jax.models.attention import ATTENDED
from rlhf_jax.models.attention_mask import AttentionMask, attention_mask, causal_mask
from rlhf_jax.models.cache import Cache, empty_cache, fill, is_empty, visible_in_cache
from rlhf_jax.models.cudnn_attention import FORWARD, check_head_width
from rlhf_jax.models.interface import Params, positions_from
from rlhf_jax.models.settings import Attention, Remat, check_cudnn_dtype
from rlhf_jax.parallel.constraints import all_gather, constrain_cache, remat_all_gather
from rlhf_jax.parallel.partition import Rules, path_name

MAX_UNSTACKED_LAYERS = 16  # each is compiled by itself


class UnstackedLayers(NamedTuple):
    """The layers of a stack, one by one."""

    layers: tuple[Any, ...]


class Block(Protocol):
    """A layer as a Linen module; in decoding, with `decode` True, by `heads` and then `attend`."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...

    def clone(self, *, decode: bool) -> Any: ...

    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask,
        positions: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """([B, S, D], (keys, values) [B, Hk, S, d]) of [B, S, D] and the keys of a prefix."""
        ...

    def heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scaled queries [B, H, L, d], and keys and values [B, Hk, L, d], of [B, L, D]."""
        ...

    def attend(
        self, x: jax.Array, q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
    ) -> jax.Array:
        """The rest of the block [B, L, D], of queries on a cache [B, Hk, C, d]."""
        ...


@dataclasses.dataclass(frozen=True)
class StackedModel(abc.ABC):
    """A model of a token embedding, a stack of blocks and a final norm.

    A family adds `init`, `embed`, `final`, `shift_final`, `check_dropout`, `partition_rules` and
    `block`, the module of one layer. All methods are those of `interface.Model`.

    Args:
      config: sizes, as in `interface.ModelConfig`, and `n_head`, `num_key_value_heads` and
        `head_width`.
      dtype: the compute dtype of products; parameters stay float32, logits come out in float32.
      remat: the values that the backward pass computes again, as in `rematerialized`.
      attention: "blocks", as in `models/attention.py`, or "cudnn", as in
        `models/cudnn_attention.py`; decoding attends as by the first either way.
      generation_config: the object in `generation_config.json`, for exports; its eos_token_id may
        be a list. Models that differ in it alone are equal.

    Attributes of the class:
      table: the name of the token embedding among the parameters, also the unembedding.
      final_norm: the name of the final norm.
      norms: a part of the paths of norms, which decoding leaves in float32.
    """

    config: Any
    dtype: str = "float32"
    remat: Remat = "dots"
    attention: Attention = "blocks"
    generation_config: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    table: ClassVar[str]
    final_norm: ClassVar[str]
    norms: ClassVar[str]

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
    @abc.abstractmethod
    def partition_rules(self) -> Rules: ...

    @property
    @abc.abstractmethod
    def block(self) -> Block: ...

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
        pattern = rf"(^|/)(kernel|{self.table}/\w+)$" if unembeds else r"(^|/)kernel$"
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return 2.0 * sum(leaf.size for path, leaf in leaves if re.search(pattern, path_name(path)))

    def layers(
        self, stack, x, mask, positions, cache=None, prefix=None, shared=None, *, dropout_key=None
    ) -> tuple[jax.Array, Cache | None]:
        others = sum(each is not None for each in (cache, prefix, shared))
        if others > 1 or (others and dropout_key is not None):
            raise ValueError(
                "layers takes a cache, a prefix or a shared prompt, one of the three, and no "
                "dropout with any of them."
            )
        if cache is not None and not is_empty(cache):
            return self._decode(stack, x, mask, positions, cache)
        shape = x.shape
        if prefix is not None:  # [G, K * T, D]
            x = x.reshape(prefix.mask.shape[0], -1, shape[-1])
        positions = positions.reshape(x.shape[:2])
        visible = attention_mask(mask, prefix, shared)

        def body(x, layer):
            params, past, key = layer
            params = all_gather(params, self.dtype, self.partition_rules, is_layer=True)
            rngs = {} if key is None else {"dropout": key}
            x, memory = self.block.apply(
                {"params": params}, x, visible, positions, past, key is None, rngs=rngs
            )
            return x, memory if cache is not None else None

        past = None if prefix is None else (prefix.keys, prefix.values)
        keys = None if dropout_key is None else jax.random.split(dropout_key, _depth(stack))
        x, memory = _run_layers(rematerialized(body, self.remat), x, stack, (past, keys))
        return x.reshape(shape), None if cache is None else fill(cache, memory, mask)

    def _decode(self, stack, x, mask, positions, cache) -> tuple[jax.Array, Cache]:
        """Writes L tokens into the cache and attends to it, layer by layer."""
        visible, new_mask = visible_in_cache(cache, causal_mask(mask), mask)
        decode = _decode_unstacked if isinstance(stack, UnstackedLayers) else _decode_stacked
        block = self.block.clone(decode=True)
        x, keys, values = decode(block, stack, x, positions, cache, visible)
        return x, Cache(keys, values, new_mask, cache.length + x.shape[1])

    def for_decoding(self, params: Params) -> Params:
        """In the compute dtype but for norms; on one CPU unstacked, the embedding in columns.

        A CPU copies each layer out of a stack before it multiplies with it, which for a small batch
        costs as much as the product.
        """
        if embedding.is_for_decoding(params[self.table]):
            return params

        def cast(path, leaf):
            return leaf if self.norms in path_name(path) else leaf.astype(self.dtype)

        params = jax.tree_util.tree_map_with_path(cast, params)
        stack, table = params["layers"], embedding.table_for_decoding(params[self.table])
        if is_on_one_cpu() and _depth(stack) <= MAX_UNSTACKED_LAYERS:
            stack = UnstackedLayers(tuple(_layer(stack, i) for i in range(_depth(stack))))
        return {**params, self.table: table, "layers": stack}

    def unembedding(self, params: Params) -> jax.Array:
        embedding.check_trainable(params[self.table])
        return params[self.table]["embedding"]

    def logits(self, params: Params, hidden: jax.Array, *, decode: bool = False) -> jax.Array:
        return self.padded_logits(params, hidden, decode=decode)[..., : self.config.vocab_size]

    def padded_logits(
        self, params: Params, hidden: jax.Array, *, decode: bool = False
    ) -> jax.Array:
        name, rules = self.table, self.partition_rules
        logits = embedding.unembed(name, params[name], hidden, self.dtype, rules, decode=decode)
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
        embedding.check_trainable(params[self.table])
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        positions = positions_from(mask)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = self.embed(params, tokens, positions, dropout_key=keys[0])
        x, _ = self.layers(params["layers"], x, mask, positions, dropout_key=keys[1])
        return self.final(params, x)

    def init_cache(self, batch: int, length: int) -> Cache:
        config = self.config
        heads, width = config.num_key_value_heads, config.head_width
        return empty_cache((config.n_layer, batch, heads, length, width), self.dtype)

    def split(self, params: Params, num_layers_unfrozen: int) -> tuple[Params, Params]:
        """The embeddings, and with them the unembedding, freeze with any layer."""
        embedding.check_trainable(params[self.table])
        count = _depth(params["layers"])
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
        trained = {"layers": upper, self.final_norm: params[self.final_norm]}
        frozen = {name: part for name, part in params.items() if name not in trained}
        return {**frozen, "layers": lower}, trained

    def merge(self, frozen: Params, trained: Params) -> Params:
        halves = frozen["layers"], trained["layers"]
        stack = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *halves)
        return {**frozen, **trained, "layers": stack}


def _depth(stack: Any) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def _layer(stack: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stack)


def _run_layers(body: Any, x: jax.Array, stack: Any, others: Any) -> tuple[jax.Array, Any]:
    """`jax.lax.scan` of body(x, (layer, *others)) over a stack, or a loop over `UnstackedLayers`.

    The loop returns each output of the body as a tuple instead of a stacked array.
    """
    if not isinstance(stack, UnstackedLayers):
        return jax.lax.scan(body, x, (stack, *others))
    outputs = []
    for i, layer in enumerate(stack.layers):
        x, output = body(x, (layer, *_layer(others, i)))
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: leaves, *outputs)


def _decode_stacked(block, stack, x, positions, cache, visible):
    def body(carry, params):
        x, keys, values, i = carry
        params = {"params": params}
        q, *new = block.apply(params, x, positions, method="heads")
        # Written first and then read: XLA copies a cache that is read and then written.
        keys, values = (
            jax.lax.dynamic_update_slice(memory, part[None], (i, 0, 0, cache.length, 0))
            for memory, part in zip((keys, values), new, strict=True)
        )
        past = (jax.lax.dynamic_index_in_dim(m, i, keepdims=False) for m in (keys, values))
        x = block.apply(params, x, q, *past, visible, method="attend")
        return (x, keys, values, i + 1), None

    past = (constrain_cache(cache.keys), constrain_cache(cache.values))
    (x, keys, values, _), _ = jax.lax.scan(body, (x, *past, 0), stack)
    return x, keys, values


def _decode_unstacked(block, stack, x, positions, cache, visible):
    at, memories = (0, 0, cache.length, 0), []
    for params, *past in zip(stack.layers, cache.keys, cache.values, strict=True):
        q, *new = block.apply({"params": params}, x, positions, method="heads")
        past = [
            jax.lax.dynamic_update_slice(memory, part, at)
            for memory, part in zip(past, new, strict=True)
        ]
        x = block.apply({"params": params}, x, q, *past, visible, method="attend")
        memories.append(past)
    keys, values = zip(*memories, strict=True)
    return x, keys, values


def _is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether it is cuDNN's attention, whose outputs cannot be named with `checkpoint_name`."""
    return primitive.name == FORWARD


_POLICIES = {
    "full": None,
    # Products with parameters have no batch axes; those inside attention have.
    "dots": functools.reduce(
        jax.checkpoint_policies.save_from_both_policies,
        (
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(ATTENDED),
            _is_cudnn,
        ),
    ),
}


def rematerialized(body: Any, remat: Remat) -> Any:
    """The body of a scan over layers, whose backward pass computes some values again.

    Args:
      body: (carry, layer) -> (carry, output).
      remat: "none" saves everything except parameters gathered from other devices; "full" the
        carry alone, so that the layer is computed again; "dots" also the products with parameters
        and the outputs of attention, so that norms and activations are computed again. Values and
        gradients are the same.

    Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174).
    """
    if remat == "none":
        return remat_all_gather(body)
    # In a scan the compiler cannot merge the two computations, which is what CSE would do.
    return jax.checkpoint(body, prevent_cse=False, policy=_POLICIES[remat])
