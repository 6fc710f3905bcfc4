"""What config.json says of decoders, and what is refused."""

import json
import math

import numpy as np
import pytest
import transformers

from rlhf_jax.errors import InputError
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.models.huggingface import described_model
from rlhf_jax.models.rope import Rope
from tests.models.test_decoder_parity import CASES, GOLDEN

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def read(folder, data) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(data))
    return described_model(folder).config


@pytest.mark.parametrize("case", CASES)
def test_configurations_of_both_versions_of_transformers_are_read_alike(case, tmp_path):
    config = read(
        tmp_path, json.loads(str(GOLDEN[f"{case}/config"]))
    )  # as transformers 4 writes it
    installed = transformers.AutoConfig.from_pretrained(tmp_path)
    installed.save_pretrained(tmp_path)
    assert described_model(tmp_path).config == config


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("mixtral", {}, "model_type is 'mixtral', but only"),
        ("llama", {"hidden_size": None}, "hidden_size must be an integer from 1 on, but is None."),
        ("llama", {"hidden_size": 1.5}, "hidden_size must be an integer from 1 on, but is 1.5."),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads must be a multiple of"),
        ("llama", {"head_dim": 7}, "head_dim must be even"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps must be a number above 0, but is -1.0."),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps must be a number above 0, but is nan."),
        ("llama", {"hidden_act": "relu2"}, "The activation 'relu2' is unknown"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp is 2, but only 1 is supported"),
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false, but is 1."),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic', but only"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs a factor"),
        ("llama", {"rope_theta": 0}, "rope_theta must be a number above 0, but is 0."),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor is not 1"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop is 0.1, but only 0.0 is supported"),
        ("mistral", {"attention_bias": True}, "attention_bias is True, but only False is"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias is True, but only False is supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must hold full_attention or"),
        ("gemma2", {"sliding_window": 0}, "sliding_window must be at least 1"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must hold 0 or 1 for each"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_key(model_type, settings, expected, tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, {"model_type": model_type, **SIZES, **settings})
    assert str(error.value).removeprefix(f"{tmp_path / 'config.json'}: ").startswith(expected)


def test_layers_of_two_kinds(tmp_path):
    config = read(tmp_path, {"model_type": "gemma3_text", **SIZES, "num_hidden_layers": 8})
    assert config.is_sliding == (True,) * 5 + (False, True, True)
    config = read(tmp_path, {"model_type": "gemma2", **SIZES})
    assert config.is_sliding == (True, False, True, False)
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    config = read(tmp_path, {"model_type": "qwen2", **SIZES, **sliding})
    assert config.is_sliding == (False, False, False, True)
    config = read(tmp_path, {"model_type": "smollm3", **SIZES})
    assert config.no_rope_layers == (1, 1, 1, 0)  # 1 means that the layer has rotary positions


def test_the_first_of_several_end_tokens_is_that_of_the_model(tmp_path):
    assert (
        read(tmp_path, {"model_type": "llama", **SIZES, "eos_token_id": [5, 7]}).eos_token_id == 5
    )


def test_frequencies_of_llama_3_keep_short_wavelengths_and_divide_long_ones():
    rope = Rope(10000.0, "llama3", 8.0, 1024, 1.0, 4.0)
    plain, scaled = Rope(10000.0).frequencies(64), rope.frequencies(64)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 1024 / 4, wavelengths > 1024 / 1
    assert short.any()
    assert long.any()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    share = (1024 / wavelengths[between] - 1) / 3
    expected = (1 - share) * plain[between] / 8 + share * plain[between]
    np.testing.assert_allclose(scaled[between], expected, rtol=1e-5)
