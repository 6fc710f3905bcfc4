"""Configurations of decoders in config.json, and those that are refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from rlhf_jax.errors import InputError
from rlhf_jax.models import load_pretrained, save_pretrained, save_reward_model
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.models.family import param_shapes
from rlhf_jax.models.huggingface import described_model
from rlhf_jax.models.rope import Rope, rotate
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
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 2}


def rope(**values):
    return {"rope_scaling": values}


def read(folder, data) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(data))
    return described_model(folder).config


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
    ],
)
def test_published_models_have_their_number_of_parameters(name, count):
    """Those of the model cards and of the index of their tensors; no vocabulary is padded here."""
    shapes = param_shapes(described_model(name))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


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
        (
            "llama",
            {"hidden_size": None},
            "hidden_size must be an integer from 1 to 2147483647, but",
        ),
        ("llama", {"hidden_size": 1.5}, "hidden_size must be an integer from 1 to 2147483647, but"),
        (
            "llama",
            {"num_key_value_heads": 3},
            "num_attention_heads must be a multiple of num_key_value_heads, but 4 is not a mul",
        ),
        ("llama", {"head_dim": 7}, "head_dim must be even"),
        ("llama", {"rms_norm_eps": -1.0}, "config.rms_norm_eps must be above 0, but is -1.0."),
        (
            "llama",
            {"rms_norm_eps": math.nan},
            "config.rms_norm_eps must be a finite number, but is",
        ),
        ("llama", {"hidden_act": "relu2"}, "config.hidden_act must be silu, gelu or gelu_pytorch_"),
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
        ("gemma2", {"sliding_window": 0}, "sliding_window must be an integer from 1 to"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must hold 0 or 1 for each"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers must hold 0 or 1 for each"),
        ("smollm3", {"no_rope_layers": 3}, "no_rope_layers must be a list of 0 and 1, but is 3."),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be an integer"),
        ("smollm3", {"layer_types": [SLIDING] * 4}, "layer_types holds sliding_attention, but"),
        ("qwen2", {"layer_types": [SLIDING] * 4}, "layer_types holds sliding_attention, but"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers must"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern must be an integer"),
        ("gemma2", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all',"),
        ("gemma2", {"hidden_activation": 3}, "hidden_activation must be one of silu, gelu, gel"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping must be a number above"),
        ("llama", {"hidden_act": ["silu"]}, 'hidden_act must be a string, but is ["silu"].'),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers must be an integer from 1 to 1"),
        ("llama", {"head_dim": 2**31}, "config.head_dim must be at most 2147483647, but is"),
        ("llama", {"rms_norm_eps": 10**400}, "config.rms_norm_eps must be a finite number, but is"),
        (
            "llama",
            {"initializer_range": False},
            "initializer_range must be a number, but is false.",
        ),
        (
            "llama",
            {"attention_dropout": 1},
            "config.attention_dropout must be at least 0 and below 1, but",
        ),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, but is"),
        (
            "llama",
            rope(rope_type="linear", type="yarn"),
            "rope_type is 'linear', but type is 'yarn'",
        ),
        ("llama", {"rope_scaling": False}, "rope_scaling must be an object or null, but is False."),
        ("llama", {"rope_parameters": []}, "rope_parameters must be an object or null, but is []."),
        (
            "llama",
            rope(rope_type="llama3", factor=2),
            "rope_type 'llama3' needs a low_freq_factor,",
        ),
        ("llama", rope(**{**LLAMA3, "high_freq_factor": 1}), "high_freq_factor must be above low_"),
        ("llama", rope(**YARN, truncate=1), "truncate must be true or false, but is 1."),
        ("llama", rope(**YARN, mscale="1"), "mscale must be a number above 0, but is '1'."),
        ("llama", rope(**YARN, rope_theta=1), "rope_theta must be above 1 for yarn, but is 1.0."),
        ("llama", rope(**YARN, original_max_position_embeddings=1.5), "original_max_position_emb"),
        ("phi3", rope(**YARN), "rope_type is 'yarn', but only 'default' is supported for phi3"),
        (
            "gemma3_text",
            {"rope_parameters": {SLIDING: 5}},
            "rope_parameters.sliding_attention must be an object, but is 5.",
        ),
    ],
)
def test_unsupported_keys_are_refused_by_name(model_type, settings, expected, tmp_path):
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
    config = read(tmp_path, {"model_type": "smollm3", **SIZES, **sliding})
    assert config.is_sliding == (False, False, False, True)


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {"pretraining_tp": 2}, {}),
        ("smollm3", {"pretraining_tp": 2}, {"eos_token_id": None}),
        ("gemma2", {"use_bidirectional_attention": False}, {"eos_token_id": 1, "pad_token_id": 0}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, {"attention_softcap": None}),
        ("mistral", {}, {"max_position_embeddings": 131072, "num_key_value_heads": 8}),
        ("gemma3_text", {}, {"max_position_embeddings": 131072, "bos_token_id": 2}),
        ("qwen2", {}, {"max_position_embeddings": 32768, "num_key_value_heads": 32}),
        ("qwen3", {"num_key_value_heads": None}, {"num_key_value_heads": 64, "head_dim": 128}),
        ("smollm3", {}, {"max_position_embeddings": 32768, "num_key_value_heads": 4}),
        ("gemma2", {}, {"max_position_embeddings": 8192, "tie_word_embeddings": True}),
        ("phi3", {}, {"max_position_embeddings": 4096, "bos_token_id": 1, "pad_token_id": None}),
        ("olmo2", {}, {"max_position_embeddings": 2048, "pad_token_id": 1, "bos_token_id": None}),
        ("granite", {}, {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_absent_keys_have_the_values_of_transformers(model_type, settings, expected, tmp_path):
    sizes = {**SIZES, "hidden_size": 128, "num_attention_heads": 64}
    for key in ("num_key_value_heads", "max_position_embeddings"):
        del sizes[key]
    config = read(tmp_path, {"model_type": model_type, **sizes, **settings})
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_original_length_is_no_part_of_linear_scaling(tmp_path):
    linear = rope(rope_type="linear", factor=2, original_max_position_embeddings=32)
    config = read(tmp_path, {"model_type": "llama", **SIZES, **linear})
    assert config.rope == Rope(10000.0, "linear", 2.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_position", "between"),
        ("qk_norm", "all"),
        ("residual_scale", math.inf),
        ("logit_divisor", 0.0),
        ("pad_token_id", 61),
        ("eos_token_id", -1),
    ],
)
def test_configurations_made_directly_are_checked(name, value):
    with pytest.raises(InputError, match=f"{name} must (not )?be .*, but is {value!r}."):
        DecoderConfig(**SIZES, head_dim=8, **{name: value})


@pytest.mark.parametrize("file", [None, {"do_sample": True}, {"eos_token_id": 9}])
def test_several_end_tokens(file, tmp_path):
    """The first one is that of the model; all of them stop, and are written again."""
    data = {"model_type": "llama", **SIZES, "eos_token_id": [5, 7]}
    folder = saved(tmp_path, data)
    (folder / "generation_config.json").unlink()
    if file is not None:
        (folder / "generation_config.json").write_text(json.dumps(file))
    model, params = load_pretrained(folder)
    assert model.config.eos_token_id == 5
    assert model.stop_token_ids == ((9,) if file and "eos_token_id" in file else (5, 7))
    config = dataclasses.replace(model.config, eos_token_id=7)
    save_pretrained(folder, dataclasses.replace(model, config=config), params)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [7, 5]


def saved(folder, data):
    """The folder of a fresh model with this config.json."""
    config = read(folder, data)
    model = Decoder(config)
    save_pretrained(folder, model, model.init(jax.random.key(0)))
    return folder


def test_what_is_written_is_the_configuration_of_the_model(tmp_path):
    data = {"model_type": "qwen2", **SIZES, "score_bias": 2.0, "tie_word_embeddings": False}
    model = Decoder(dataclasses.replace(read(tmp_path, data), tie_word_embeddings=True))
    params = model.init(jax.random.key(0))
    save_pretrained(tmp_path, model, params)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"]
    assert not {"score_bias", "eos_token_id"} & written.keys()
    save_reward_model(tmp_path, model, {"model": params, "head": {"kernel": jnp.zeros(32)}})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] is False  # as in the config.json of the language model
    changed = Decoder(dataclasses.replace(model.config, rms_norm_eps=0.5))
    with pytest.raises(ValueError, match="differs from its config.json in rms_norm_eps,"):
        save_pretrained(tmp_path, changed, params)
    directly = Decoder(dataclasses.replace(model.config, source="{}"))
    with pytest.raises(ValueError, match="make it by fresh_model or from a config.json"):
        save_pretrained(tmp_path, directly, params)


def test_scales_multiply_in_float32():
    x = jnp.linspace(1, 2, 64, dtype=jnp.bfloat16).reshape(1, 1, 1, 64)
    still = jnp.ones((1, 1, 32)), jnp.zeros((1, 1, 32))
    actual = rotate(x, still, 0.3003)
    np.testing.assert_array_equal(actual, (x.astype(np.float32) * 0.3003).astype(jnp.bfloat16))
    assert (actual != x * jnp.bfloat16(0.3003)).any()


@pytest.mark.parametrize(("rounds", "scale"), [(False, 3.3), (True, float(jnp.bfloat16(3.3)))])
def test_the_embedding_scale_of_gemma_is_rounded(rounds, scale):
    config = DecoderConfig(**SIZES, head_dim=8, embedding_scale=3.3, rounds_embedding_scale=rounds)
    model = Decoder(config, "bfloat16")
    params = model.init(jax.random.key(0))
    tokens = jnp.arange(61)[None]
    actual = model.embed(params, tokens, tokens)
    table = params["embed_tokens"]["embedding"][:61].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(actual[0], (table * scale).astype(jnp.bfloat16))


def test_a_window_ends_with_the_positions(tmp_path):
    config = read(tmp_path, {"model_type": "gemma2", **SIZES, "sliding_window": 100})
    assert Decoder(config).context(jnp.zeros((1, 1), int), slice(4)).window == 64


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
