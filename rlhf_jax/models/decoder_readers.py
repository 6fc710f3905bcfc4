"""From config.json to the switches of a decoder, a function for each family.

The families are those of the configurations and models of transformers 4.57 and 5. A setting that
would change the numbers and is not computed here raises an InputError that names it.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, get_args

from rlhf_jax.errors import InputError
from rlhf_jax.models.config_values import integer, is_true, positive
from rlhf_jax.models.decoder_config import SIZES, Activation, DecoderConfig
from rlhf_jax.models.family import TOKEN_IDS, check_fixed, known_fields
from rlhf_jax.models.rope import read_rope

Data = Mapping[str, Any]

_FULL, _SLIDING = "full_attention", "sliding_attention"
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_LLAMA = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# The values in transformers of keys that a config.json does not have.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma2": {**_GEMMA, "max_position_embeddings": 8192},
    "gemma3_text": {**_GEMMA, "max_position_embeddings": 131072},
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    "olmo2": {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    },
    "phi3": {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    "granite": _LLAMA,
}


def read_config(data: Data) -> DecoderConfig:
    """The configuration of a decoder that the object in a config.json describes.

    Raises:
      InputError: a value is not of its type or range, or is not supported.
    """
    for name, highest in SIZES.items():
        integer(name, data.get(name), 1, highest)
    model_type, size = data["model_type"], data["vocab_size"]
    defaults = {
        name: value
        for name, value in DEFAULTS[model_type].items()
        if name not in TOKEN_IDS or value < size
    }
    config = _READERS[model_type]({**defaults, **data})
    return dataclasses.replace(config, source=json.dumps(dict(data), sort_keys=True))


def _llama(data: Data) -> DecoderConfig:
    return _config(data, {}, mlp_bias=is_true(data, "mlp_bias"), **_attention_bias(data))


def _mistral(data: Data) -> DecoderConfig:
    return _config(data, _NO_BIAS, **_all_sliding(data, 4096))


def _qwen2(data: Data) -> DecoderConfig:
    return _config(data, _NO_BIAS, qkv_bias=True, **_qwen_layers(data))


def _qwen3(data: Data) -> DecoderConfig:
    switches = {**_attention_bias(data), **_qwen_layers(data)}
    return _config(data, {"mlp_bias": False}, qk_norm="head", **switches)


def _qwen_layers(data: Data) -> dict[str, Any]:
    """The layers from `max_window_layers` on are sliding where `use_sliding_window` is true."""
    first = integer("max_window_layers", data.get("max_window_layers", 28), 0)
    types = (_SLIDING if i >= first else _FULL for i in range(data["num_hidden_layers"]))
    return _optionally_sliding(data, 4096, tuple(types))


def _gemma2(data: Data) -> DecoderConfig:
    types = tuple(_FULL if i % 2 else _SLIDING for i in range(data["num_hidden_layers"]))
    return _config(
        data,
        {"mlp_bias": False},
        attention_softcap=_cap(data, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(data, "final_logit_softcapping", 30.0),
        layer_types=_layer_types(data, types),
        **_gemma(data),
    )


def _gemma3(data: Data) -> DecoderConfig:
    period = integer("sliding_window_pattern", data.get("sliding_window_pattern", 6))
    count = data["num_hidden_layers"]
    types = tuple(_SLIDING if (i + 1) % period else _FULL for i in range(count))
    local = positive("rope_local_base_freq", data.get("rope_local_base_freq", 10000.0))
    own = {"rope_theta": local, "rope_parameters": data.get("rope_parameters")}
    by_type = isinstance(own["rope_parameters"], Mapping) and _SLIDING in own["rope_parameters"]
    return _config(
        data,
        {"mlp_bias": False},
        qk_norm="head",
        logit_softcap=_cap(data, "final_logit_softcapping", None),
        layer_types=_layer_types(data, types),
        rope=read_rope(data, 1e6, _FULL),
        sliding_rope=read_rope(own if by_type else {"rope_theta": local}, local, _SLIDING),
        **_gemma(data),
    )


def _gemma(data: Data) -> dict[str, Any]:
    if value := data.get("use_bidirectional_attention"):
        raise InputError(
            f"use_bidirectional_attention is {value!r}, but only False is supported; choose "
            "another model."
        )
    activation = data.get("hidden_activation", "gelu_pytorch_tanh")
    if activation not in get_args(Activation):
        choices = ", ".join(get_args(Activation))
        raise InputError(f"hidden_activation must be one of {choices}, but is {activation!r}.")
    scalar = positive("query_pre_attn_scalar", data.get("query_pre_attn_scalar", 256))
    return {
        "hidden_act": activation,
        "norm_position": "both",
        "norm_offset": 1.0,
        "norm_casts_last": True,
        **_attention_bias(data),
        "sliding_window": data.get("sliding_window", 4096),
        "attention_scale": scalar**-0.5,
        "embedding_scale": data["hidden_size"] ** 0.5,
        "rounds_embedding_scale": True,
    }


def _smollm3(data: Data) -> DecoderConfig:
    interval = integer("no_rope_layer_interval", data.get("no_rope_layer_interval", 4))
    with_rope = data.get("no_rope_layers")
    if with_rope is None:
        with_rope = [int((i + 1) % interval != 0) for i in range(data["num_hidden_layers"])]
    if not isinstance(with_rope, list) or any(type(i) is not int for i in with_rope):
        raise InputError(f"no_rope_layers must be a list of 0 and 1, but is {with_rope!r}.")
    types = tuple(_FULL if rope else _SLIDING for rope in with_rope)
    return _config(
        data,
        {},
        rope=read_rope(data, 2e6),
        no_rope_layers=tuple(with_rope),
        mlp_bias=is_true(data, "mlp_bias"),
        **_attention_bias(data),
        **_optionally_sliding(data, None, types),
    )


def _olmo2(data: Data) -> DecoderConfig:
    return _config(
        data,
        {"mlp_bias": False},
        norm_position="after",
        norm_casts_last=True,
        qk_norm="projection",
        **_attention_bias(data),
    )


def _phi3(data: Data) -> DecoderConfig:
    fixed = {**_NO_BIAS, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    rope = read_rope(data, 10000.0)
    if rope.rope_type != "default":
        raise InputError(
            f"rope_type is {rope.rope_type!r}, but only 'default' is supported for phi3; choose "
            "another model."
        )
    return _config(data, fixed, rope=rope, fused_projections=True, **_all_sliding(data, None))


def _granite(data: Data) -> DecoderConfig:
    return _config(
        data,
        {},
        mlp_bias=is_true(data, "mlp_bias"),
        **_attention_bias(data),
        embedding_scale=positive("embedding_multiplier", data.get("embedding_multiplier", 1.0)),
        residual_scale=positive("residual_multiplier", data.get("residual_multiplier", 1.0)),
        attention_scale=positive("attention_multiplier", data.get("attention_multiplier", 1.0)),
        logit_divisor=positive("logits_scaling", data.get("logits_scaling", 1.0)),
    )


def _attention_bias(data: Data) -> dict[str, bool]:
    bias = is_true(data, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


def _all_sliding(data: Data, default: int | None) -> dict[str, Any]:
    window = data.get("sliding_window", default)
    types = () if window is None else (_SLIDING,) * data["num_hidden_layers"]
    return {"layer_types": types, "sliding_window": window}


def _optionally_sliding(data: Data, default: int | None, types: tuple[str, ...]) -> dict[str, Any]:
    """Layers of these types where `use_sliding_window` is true and there is a window."""
    uses = is_true(data, "use_sliding_window")
    window = data.get("sliding_window", default) if uses else None
    types = types if window is not None else (_FULL,) * data["num_hidden_layers"]
    types = _layer_types(data, types)
    if _SLIDING in types and not uses:
        raise InputError(
            "layer_types holds sliding_attention, but use_sliding_window is false; set one of the "
            "two in config.json."
        )
    return {"layer_types": types, "sliding_window": window}


def _layer_types(data: Data, default: tuple[str, ...]) -> tuple[str, ...]:
    types = data.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise InputError(f"layer_types must be a list of strings, but is {types!r}.")
    return tuple(types)


def _cap(data: Data, key: str, default: float | None) -> float | None:
    value = data.get(key, default)
    return None if value is None else positive(key, value)


def _config(data: Data, fixed: Data, **switches: Any) -> DecoderConfig:
    """The configuration with the sizes and constants of config.json and these switches.

    Args:
      fixed: keys that may be absent or have this value.
    """
    check_fixed(data, fixed)
    if data.get("quantization_config"):
        raise InputError("quantization_config is set, but quantized weights are not supported.")
    heads = data["num_attention_heads"]
    implied = {"num_key_value_heads": heads, "head_dim": data["hidden_size"] // heads}
    data = {**data, **{name: size for name, size in implied.items() if data.get(name) is None}}
    eos = data.get("eos_token_id")
    if isinstance(eos, list):  # the further ones are in the generation_config of the model
        data["eos_token_id"] = eos[0] if eos else None
    constants = {name: data[name] for name in _CONSTANTS if name in data}
    values = {"rope": read_rope(data, 10000.0), **known_fields(DecoderConfig, constants)}
    return DecoderConfig(**{**values, **switches})


_CONSTANTS = (
    *SIZES,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "model_type",
    "hidden_act",
    "tie_word_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "attention_dropout",
    *TOKEN_IDS,
)

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
