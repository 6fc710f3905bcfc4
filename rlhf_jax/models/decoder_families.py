"""The families of decoders: their configurations and tensors in Hugging Face's files."""

import dataclasses
import functools
import json
from typing import Any

import jax

from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.models.decoder_readers import DEFAULTS, Data, read_config
from rlhf_jax.models.decoder_sizes import SIZES
from rlhf_jax.models.family import TOKEN_IDS, Family, Slot, param_shapes
from rlhf_jax.models.settings import ModelSettings


def _slots(model: Decoder) -> dict[str, Slot]:
    """Every tensor, by the paths of the parameters: kernels are [out, in] in the file."""
    config, params = model.config, param_shapes(model)
    slots = {}
    vocabulary = (config.vocab_size, config.hidden_size)
    for table in ("embed_tokens", "lm_head"):
        if table in params:
            slots[f"{table}.weight"] = Slot((table, "embedding"), None, vocabulary)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"]):
        keys = tuple(part.key for part in path)
        name = ".".join((*keys[:-1], "bias" if keys[-1] == "bias" else "weight"))
        transposed, shape = keys[-1] == "kernel", leaf.shape[1:]
        shape = shape[::-1] if transposed else shape
        for layer in range(config.num_hidden_layers):
            slots[f"layers.{layer}.{name}"] = Slot(("layers", *keys), layer, shape, transposed)
    slots["norm.weight"] = Slot(("norm", "scale"), None, (config.hidden_size,))
    return slots


def _write_config(config: DecoderConfig, is_classifier: bool) -> dict[str, Any]:
    """The keys of the config.json that it was read from, with the current values.

    Raises:
      ValueError: it was not read from one, or differs from it in a field that is not written.
    """
    data = json.loads(config.source)
    if not data:
        raise ValueError(
            "A DecoderConfig that was made directly has no config.json to write; make it by "
            "fresh_model or from a config.json."
        )
    known = data.keys() | DEFAULTS[config.model_type].keys()
    ids = {name: getattr(config, name) for name in TOKEN_IDS}
    data.update({name: i for name, i in ids.items() if i is not None or name in known})
    listed, own = json.loads(config.source).get("eos_token_id"), config.eos_token_id
    if isinstance(listed, list) and own in listed:
        data["eos_token_id"] = [own, *(i for i in listed if i != own)]
    data["vocab_size"] = config.vocab_size
    if not is_classifier:  # the configuration of a classifier is tied whatever its config.json says
        data["tie_word_embeddings"] = config.tie_word_embeddings
    again = read_config(data)
    again = dataclasses.replace(again, tie_word_embeddings=config.tie_word_embeddings)
    if again != config:
        names = [field.name for field in dataclasses.fields(config) if field.compare]
        changed = [name for name in names if getattr(again, name) != getattr(config, name)]
        raise ValueError(
            f"The configuration differs from its config.json in {', '.join(changed)}, which would "
            "not be written; make it by fresh_model or from a config.json."
        )
    return data


def _fresh_config(defaults: Data, settings: ModelSettings, vocab_size: int) -> DecoderConfig:
    """The configuration of a fresh model, through its config.json, in which `defaults` stand."""
    width = settings.n_embd
    data = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": -(-8 * width // 3 // 8) * 8,  # two thirds of 4 D, in eights
        "num_hidden_layers": settings.n_layer,
        "num_attention_heads": settings.n_head,
        "num_key_value_heads": settings.n_head,
        "head_dim": width // settings.n_head,
        "query_pre_attn_scalar": width // settings.n_head,  # of Gemma
        "attention_multiplier": (width // settings.n_head) ** -0.5,  # of Granite
        "tie_word_embeddings": True,
        "max_position_embeddings": settings.n_positions,
        "attention_dropout": settings.dropout,
        "initializer_range": 0.02,
        "use_cache": True,
        **dict.fromkeys(TOKEN_IDS),
        **defaults,
    }
    return read_config(data)


def _family(
    name: str, model_type: str, classes: str, classifier: str | None = None, **fresh: Any
) -> Family:
    """A family; `fresh` are keys of the config.json of a fresh model."""

    return Family(
        name=name,
        model_type=model_type,
        language_model=f"{classes}ForCausalLM",
        classifier=f"{classifier or classes}ForSequenceClassification",
        config=DecoderConfig,
        model=Decoder,
        read_config=read_config,
        write_config=_write_config,
        fresh_config=functools.partial(_fresh_config, {"model_type": model_type, **fresh}),
        slots=_slots,
        prefix="model.",
        tied={"lm_head.weight": "embed_tokens.weight"},
        ignored=("rotary_emb.inv_freq",),  # in old checkpoints
        sizes={
            hub_name: read_config(data)
            for hub_name, data in SIZES.items()
            if data["model_type"] == model_type
        },
    )


FAMILIES = (
    _family("Llama", "llama", "Llama"),
    _family("Mistral", "mistral", "Mistral", sliding_window=None),
    _family("Qwen2", "qwen2", "Qwen2"),
    _family("Qwen3", "qwen3", "Qwen3"),
    _family("Gemma 2", "gemma2", "Gemma2"),
    _family("Gemma 3", "gemma3_text", "Gemma3", "Gemma3Text"),
    _family("SmolLM3", "smollm3", "SmolLM3"),
    _family("OLMo 2", "olmo2", "Olmo2"),
    _family("Phi-3", "phi3", "Phi3"),
    _family("Granite", "granite", "Granite"),
)
