"""A second model family in one file: RMS norms, grouped-query attention, PyTorch's matrices.

Positions come from the causal mask alone.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import InputError
from rlhf_jax.models.attention import attend_to_cache, self_attention
from rlhf_jax.models.attention_mask import AttentionMask
from rlhf_jax.models.dense import Dense
from rlhf_jax.models.embedding import lookup, padded_vocab_size
from rlhf_jax.models.family import Family, Slot, known_fields
from rlhf_jax.models.stacked import StackedModel
from rlhf_jax.parallel.constraints import all_gather, constrain_batch, constrain_batch_over_data

RULES = (
    (r"tokens/embedding", P("tensor", "fsdp")),
    (r"(q|k|v|up)/kernel", P(None, "fsdp", "tensor")),
    (r"(out|down)/kernel", P(None, "tensor", "fsdp")),
    (r"(norm_1|norm_2)/scale|(q|k|v|up|out|down)/bias", P()),
)


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    vocab_size: int = 11
    n_positions: int = 16
    n_embd: int = 16
    n_layer: int = 2
    n_head: int = 4
    num_key_value_heads: int = 2
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    @property
    def head_width(self):
        return self.n_embd // self.n_head


class Block(nn.Module):
    config: TinyConfig
    dtype: str
    attention: str = "blocks"
    decode: bool = False

    def setup(self):
        config = self.config
        narrow = config.num_key_value_heads * config.head_width
        sizes = {"q": config.n_embd, "k": narrow, "v": narrow, "out": config.n_embd}
        sizes |= {"up": 2 * config.n_embd, "down": config.n_embd}
        for name, size in sizes.items():
            setattr(self, name, Dense((size,), self.dtype, nn.initializers.normal(0.1)))
        self.norm_1, self.norm_2 = nn.RMSNorm(), nn.RMSNorm()

    def __call__(self, x, mask, rotation, past=None, deterministic=True):
        q, k, v = self.heads(x, rotation)
        out = self_attention(q, k, v, mask, past, implementation=self.attention)
        return self.rest(x, out), (k, v)

    def heads(self, x, rotation):
        h = self._place(self.norm_1(x))
        parts = [constrain_batch(dense(h), last="tensor") for dense in (self.q, self.k, self.v)]
        width = self.config.head_width
        q, k, v = (jnp.swapaxes(h.reshape(*h.shape[:2], -1, width), 1, 2) for h in parts)
        return q * width**-0.5, k, v

    def attend(self, q, keys, values, visible):
        return attend_to_cache(q, keys, values, visible)

    def rest(self, x, out):
        out = jnp.swapaxes(out, 1, 2).reshape(x.shape)
        x = self._place(x + self.out(out))
        return self._place(x + self.down(nn.silu(self.up(self._place(self.norm_2(x))))))

    def _place(self, x):
        return constrain_batch_over_data(x, last="fsdp") if self.decode else constrain_batch(x)


@dataclasses.dataclass(frozen=True)
class Tiny(StackedModel):
    config: TinyConfig

    table, final_norm, norms = "tokens", "norm", "norm"
    rules = RULES

    @property
    def block(self):
        return Block(self.config, self.dtype, self.attention)

    def check_dropout(self):
        """There is none."""

    def init(self, key):
        config = self.config
        key, *keys = jax.random.split(key, 1 + config.n_layer)
        x = jnp.zeros((1, 1, config.n_embd))
        mask = AttentionMask(jnp.ones((1, 1, 1, 1), bool))
        block = Block(config, self.dtype)
        layers = jax.vmap(lambda key: block.init(key, x, mask, None)["params"])(jnp.stack(keys))
        shape = (padded_vocab_size(config.vocab_size), config.n_embd)
        is_token = jnp.arange(shape[0])[:, None] < config.vocab_size
        table = jnp.where(is_token, jax.random.normal(key, shape), 0.0)
        return {
            "tokens": {"embedding": table},
            "layers": layers,
            "norm": {"scale": jnp.ones(config.n_embd)},
        }

    def embed(self, params, tokens, positions, *, decode=False, dropout_key=None):
        tables = {"tokens": params["tokens"]}
        tables = tables if decode else all_gather(tables, self.dtype, RULES)
        x = lookup(tables["tokens"], tokens).astype(self.dtype)
        return constrain_batch_over_data(x, last="fsdp") if decode else constrain_batch(x)

    def final(self, params, x):
        return nn.RMSNorm().apply({"params": params["norm"]}, x)

    def shift_final(self, params, shift):
        raise InputError("an RMS norm has no bias.")


NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}


def read_config(data):
    data = {NAMES.get(name, name): value for name, value in data.items()}
    return TinyConfig(**known_fields(TinyConfig, data))


def write_config(config, is_classifier):
    names = {ours: theirs for theirs, ours in NAMES.items()}
    return {names.get(name, name): value for name, value in dataclasses.asdict(config).items()}


def fresh_config(settings, vocab_size):
    sizes = (settings.n_positions, settings.n_embd, settings.n_layer, settings.n_head)
    return TinyConfig(vocab_size, *sizes)


def slots(model):
    config = model.config
    width, narrow = config.n_embd, config.num_key_value_heads * config.head_width
    by_name = {
        "embed_tokens.weight": Slot(("tokens", "embedding"), None, (config.vocab_size, width)),
        "norm.weight": Slot(("norm", "scale"), None, (width,)),
    }
    matrices = {"q": (width, width), "k": (narrow, width), "v": (narrow, width)}
    matrices |= {"out": (width, width), "up": (2 * width, width), "down": (width, 2 * width)}
    for layer in range(config.n_layer):
        for name, shape in matrices.items():  # [out, in]
            path, prefix = ("layers", name), f"layers.{layer}.{name}"
            by_name[f"{prefix}.weight"] = Slot((*path, "kernel"), layer, shape, transposed=True)
            by_name[f"{prefix}.bias"] = Slot((*path, "bias"), layer, shape[:1])
        for name in ("norm_1", "norm_2"):
            slot = Slot(("layers", name, "scale"), layer, (width,))
            by_name[f"layers.{layer}.{name}.weight"] = slot
    return by_name


FAMILY = Family(
    name="Tiny",
    model_type="tiny",
    language_model="TinyForCausalLM",
    classifier="TinyForSequenceClassification",
    config=TinyConfig,
    model=Tiny,
    read_config=read_config,
    write_config=write_config,
    fresh_config=fresh_config,
    slots=slots,
    prefix="model.",
    tied={"lm_head.weight": "embed_tokens.weight"},
)
