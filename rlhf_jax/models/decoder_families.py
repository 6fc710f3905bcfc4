"""From config.json to the switches of a decoder, a function for each family, and back.

What a family computes was read from the configurations and models of transformers 4.57 and 5. A
setting that would change the numbers and is not computed here raises an InputError that names it.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax

from rlhf_jax.errors import InputError
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.models.family import Family, Slot, check_fixed, param_shapes
from rlhf_jax.models.rope import read_rope
from rlhf_jax.models.settings import ModelSettings

Data = Mapping[str, Any]

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _llama(data: Data) -> DecoderConfig:
    bias = _is_true(data, "attention_bias")
    switches = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": _is_true(data, "mlp_bias")}
    return _config(data, {"pretraining_tp": 1}, **switches)


def _mistral(data: Data) -> DecoderConfig:
    fixed = {"attention_bias": False, "mlp_bias": False}
    heads = {"num_key_value_heads": data.get("num_key_value_heads", 8)}
    return _config(data, fixed, **heads, **_all_sliding(data, 4096))


def _qwen2(data: Data) -> DecoderConfig:
    fixed = {"attention_bias": False, "mlp_bias": False}
    return _config(data, fixed, qkv_bias=True, **_qwen_layers(data))


def _qwen3(data: Data) -> DecoderConfig:
    bias = _is_true(data, "attention_bias")
    switches = {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head"}
    head_dim = data.get("head_dim", 128)
    return _config(data, {"mlp_bias": False}, head_dim=head_dim, **switches, **_qwen_layers(data))


def _qwen_layers(data: Data) -> dict[str, Any]:
    """The layers from `max_window_layers` on are sliding where `use_sliding_window` is true."""
    if not _is_true(data, "use_sliding_window") or data.get("sliding_window", 4096) is None:
        return {"layer_types": (), "sliding_window": None}
    first, count = data.get("max_window_layers", 28), data["num_hidden_layers"]
    types = tuple(_SLIDING if i >= first else _FULL for i in range(count))
    window = data.get("sliding_window", 4096)
    return {"layer_types": _layer_types(data, types), "sliding_window": window}


def _gemma2(data: Data) -> DecoderConfig:
    types = tuple(_FULL if i % 2 else _SLIDING for i in range(data["num_hidden_layers"]))
    return _config(
        data,
        {"mlp_bias": False, "use_bidirectional_attention": None},
        attention_softcap=data.get("attn_logit_softcapping", 50.0),
        logit_softcap=data.get("final_logit_softcapping", 30.0),
        layer_types=_layer_types(data, types),
        **_gemma(data),
    )


def _gemma3(data: Data) -> DecoderConfig:
    period = data.get("sliding_window_pattern", data.get("_sliding_window_pattern", 6))
    count = data["num_hidden_layers"]
    types = tuple(_SLIDING if (i + 1) % period else _FULL for i in range(count))
    local = data.get("rope_local_base_freq", 10000.0)
    own = {"rope_theta": local, "rope_parameters": data.get("rope_parameters")}
    by_type = isinstance(own["rope_parameters"], Mapping) and _SLIDING in own["rope_parameters"]
    return _config(
        data,
        {"mlp_bias": False},
        qk_norm="head",
        attention_softcap=data.get("attn_logit_softcapping"),
        logit_softcap=data.get("final_logit_softcapping"),
        layer_types=_layer_types(data, types),
        rope=read_rope(data, 1e6, _FULL),
        sliding_rope=read_rope(own if by_type else {"rope_theta": local}, local, _SLIDING),
        **_gemma(data),
    )


def _gemma(data: Data) -> dict[str, Any]:
    if data.get("use_bidirectional_attention"):
        raise InputError("use_bidirectional_attention is true, but only false is supported.")
    bias = _is_true(data, "attention_bias")
    return {
        "hidden_act": data.get("hidden_activation") or "gelu_pytorch_tanh",
        "head_dim": data.get("head_dim", 256),
        "num_key_value_heads": data.get("num_key_value_heads", 4),
        "tie_word_embeddings": _is_true(data, "tie_word_embeddings", True),
        "norm_position": "both",
        "norm_offset": 1.0,
        "norm_casts_last": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "sliding_window": data.get("sliding_window", 4096),
        "attention_scale": _number(data, "query_pre_attn_scalar", 256) ** -0.5,
        "embedding_scale": data["hidden_size"] ** 0.5,
    }


def _smollm3(data: Data) -> DecoderConfig:
    count, interval = data["num_hidden_layers"], data.get("no_rope_layer_interval", 4)
    with_rope = data.get("no_rope_layers")
    if with_rope is None:
        with_rope = [int((i + 1) % interval != 0) for i in range(count)]
    bias = _is_true(data, "attention_bias")
    layers: dict[str, Any] = {}
    if _is_true(data, "use_sliding_window") and data.get("sliding_window") is not None:
        types = tuple(_SLIDING if rope else _FULL for rope in with_rope)
        layers = {
            "layer_types": _layer_types(data, types),
            "sliding_window": data["sliding_window"],
        }
    return _config(
        data,
        {"pretraining_tp": None},
        rope=read_rope(data, 2e6),
        no_rope_layers=tuple(with_rope),
        num_key_value_heads=data.get("num_key_value_heads", 4),
        tie_word_embeddings=_is_true(data, "tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=_is_true(data, "mlp_bias"),
        **layers,
    )


def _olmo2(data: Data) -> DecoderConfig:
    bias = _is_true(data, "attention_bias")
    return _config(
        data,
        {"mlp_bias": False},
        rms_norm_eps=_number(data, "rms_norm_eps", 1e-5),
        norm_position="after",
        norm_casts_last=True,
        qk_norm="projection",
        qkv_bias=bias,
        o_bias=bias,
    )


def _phi3(data: Data) -> DecoderConfig:
    fixed = {"attention_bias": False, "mlp_bias": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return _config(
        data,
        fixed,
        rms_norm_eps=_number(data, "rms_norm_eps", 1e-5),
        fused_projections=True,
        **_all_sliding(data, None),
    )


def _granite(data: Data) -> DecoderConfig:
    bias = _is_true(data, "attention_bias")
    return _config(
        data,
        {},
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=_is_true(data, "mlp_bias"),
        embedding_scale=_number(data, "embedding_multiplier", 1.0),
        residual_scale=_number(data, "residual_multiplier", 1.0),
        attention_scale=_number(data, "attention_multiplier", 1.0),
        logit_divisor=_number(data, "logits_scaling", 1.0),
    )


def _all_sliding(data: Data, default: int | None) -> dict[str, Any]:
    window = data.get("sliding_window", default)
    types = () if window is None else (_SLIDING,) * data["num_hidden_layers"]
    return {"layer_types": types, "sliding_window": window}


def _layer_types(data: Data, default: tuple[str, ...]) -> tuple[str, ...]:
    types = data.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise InputError(f"layer_types must be a list of strings, but is {types!r}.")
    return tuple(types)


def _is_true(data: Data, key: str, default: bool = False) -> bool:
    value = data.get(key, default)
    if type(value) is not bool:
        raise InputError(f"{key} must be true or false, but is {value!r}.")
    return value


def _number(data: Data, key: str, default: float) -> float:
    value = data.get(key, default)
    if type(value) not in (int, float) or not value > 0 or value == float("inf"):
        raise InputError(f"{key} must be a number above 0, but is {value!r}.")
    return float(value)


def _config(data: Data, fixed: Data, **switches: Any) -> DecoderConfig:
    """The configuration with the sizes and constants of config.json and the given switches.

    Args:
      fixed: keys that may be absent or have this value.
    """
    check_fixed(data, fixed)
    if data.get("quantization_config"):
        raise InputError("quantization_config is set, but quantized weights are not supported.")
    values: dict[str, Any] = {
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        **{name: data[name] for name in _CONSTANTS if name in data},
        "source": json.dumps(dict(data), sort_keys=True),
        **switches,
    }
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = data["num_attention_heads"]
    if values["head_dim"] is None:
        values["head_dim"] = data["hidden_size"] // max(data["num_attention_heads"], 1)
    values.setdefault("rope", read_rope(data, 10000.0))
    eos = data.get("eos_token_id")
    if isinstance(eos, list):  # the further ones stand in generation_config.json, too
        values["eos_token_id"] = eos[0] if eos else None
    return DecoderConfig(**_checked(values))


_CONSTANTS = (
    *_SIZES,
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "model_type",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "attention_dropout",
    *_IDS,
)
_INTEGERS = (
    *_SIZES,
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_OPTIONAL = ("sliding_window", *_IDS)
_NUMBERS = ("rms_norm_eps", "initializer_range", "attention_dropout")
_CAPS = ("attention_softcap", "logit_softcap")


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values, if they are of the types of their fields."""
    for name, value in values.items():
        integer = type(value) is int
        if name in _INTEGERS and not integer:
            raise InputError(f"{name} must be an integer, but is {value!r}.")
        if name in _OPTIONAL and not (integer or value is None):
            raise InputError(f"{name} must be an integer or null, but is {value!r}.")
        if name in _NUMBERS:
            values[name] = value if value == 0 else _number(values, name, 0.0)
        if name in _CAPS and value is not None:
            values[name] = _number(values, name, 0.0)
    if type(values.get("tie_word_embeddings", True)) is not bool:
        raise InputError("tie_word_embeddings must be true or false.")
    return values


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


def _write_config(config: DecoderConfig) -> dict[str, Any]:
    """The keys of the config.json that it was read from, with what may have changed since."""
    data = {name: getattr(config, name) for name in ("vocab_size", *_IDS)}
    return {**json.loads(config.source), **data}


def _fresh(defaults: Data) -> Callable[[ModelSettings, int], DecoderConfig]:
    """From the settings of a fresh model to its configuration, through its config.json."""

    def fresh(settings: ModelSettings, vocab_size: int) -> DecoderConfig:
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
            **defaults,
        }
        return _READERS[data["model_type"]](data)

    return fresh


_READERS: dict[str, Callable[[Data], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "granite": _granite,
}


def _family(
    name: str, model_type: str, classes: str, classifier: str | None = None, **fresh: Any
) -> Family:
    """A family; `fresh` are keys of the config.json of a fresh model."""

    def read(data: Data) -> DecoderConfig:
        for key in (*_SIZES, "num_attention_heads"):
            if type(data.get(key)) is not int or data[key] < 1:
                raise InputError(f"{key} must be an integer from 1 on, but is {data.get(key)!r}.")
        return _READERS[model_type](data)

    return Family(
        name=name,
        model_type=model_type,
        language_model=f"{classes}ForCausalLM",
        classifier=f"{classifier or classes}ForSequenceClassification",
        config=DecoderConfig,
        model=Decoder,
        read_config=read,
        write_config=_write_config,
        fresh_config=_fresh({"model_type": model_type, **fresh}),
        slots=_slots,
        prefix="model.",
        tied={"lm_head.weight": "embed_tokens.weight"},
        ignored=("rotary_emb.inv_freq",),  # in old checkpoints
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
