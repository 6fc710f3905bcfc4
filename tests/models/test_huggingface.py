"""Folders in Hugging Face's format: round trips, and what other programs write."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from rlhf_jax.errors import InputError
from rlhf_jax.models import huggingface, writing
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.huggingface import (
    load_pretrained,
    save_pretrained,
)
from tests.models.gpt2_folders import (
    CONFIG,
    MODEL,
    PARAMS,
    assert_equal,
    edit_config,
    edit_tensors,
    random_params,
)


def named_tensors(params):
    """The tensors of the files, by their names in them."""
    params = jax.device_get(params)
    names = {"scale": "weight", "kernel": "weight", "bias": "bias"}
    tensors = {f"{name}.weight": params[name]["embedding"] for name in ("wte", "wpe")}
    tensors["wte.weight"] = tensors["wte.weight"][: CONFIG.vocab_size]
    tensors |= {f"ln_f.{names[kind]}": array for kind, array in params["ln_f"].items()}
    for path, stack in jax.tree.leaves_with_path(params["layers"]):
        *keys, kind = (key.key for key in path)
        for layer, array in enumerate(stack):
            if "c_attn" in keys:  # [..., 3, D]
                array = array.reshape(*array.shape[:-2], -1)
            tensors[f"h.{layer}.{'.'.join(keys)}.{names[kind]}"] = np.ascontiguousarray(array)
    return tensors


# Round trips


def test_a_saved_model_is_loaded(folder):
    model, params = load_pretrained(folder)
    assert model == MODEL
    assert_equal(params, PARAMS)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_compute_dtype_leaves_the_parameters_in_float32(folder):
    model, params = load_pretrained(str(folder), dtype=jnp.bfloat16)
    assert model == GPT2(CONFIG, "bfloat16")
    assert_equal(params, PARAMS)
    with pytest.raises(InputError, match="dtype must be float32, bfloat16 or float16, .* int32"):
        load_pretrained(folder, dtype=jnp.int32)


def test_parameters_of_other_types_are_written_in_float32(tmp_path):
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    save_pretrained(tmp_path, MODEL, halves)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {
        np.dtype(np.float32)
    }
    _, params = load_pretrained(tmp_path)
    assert_equal(params, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halves))


def test_vocabulary_padding_is_cut_off_and_put_back(folder):
    tensors = load_file(folder / "model.safetensors")
    assert tensors["transformer.wte.weight"].shape == (11, 8)
    _, params = load_pretrained(folder)
    assert params["wte"]["embedding"].shape == (128, 8)
    assert not params["wte"]["embedding"][11:].any()


def test_files_are_named_as_transformers_names_them(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    config = json.loads((folder / "config.json").read_text())
    expected = {
        **{k: v for k, v in dataclasses.asdict(CONFIG).items() if k != "source"},
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": "float32",
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
    }
    assert {key: config[key] for key in expected} == expected
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 4 + 12 * CONFIG.n_layer
    np.testing.assert_array_equal(
        tensors["transformer.h.1.mlp.c_fc.weight"], PARAMS["layers"]["mlp"]["c_fc"]["kernel"][1]
    )
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_weights_are_written_byte_for_byte_as_by_safetensors(folder):
    tensors = {f"transformer.{name}": array for name, array in named_tensors(PARAMS).items()}
    assert (folder / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_without_token_ids_there_is_no_generation_config(folder):
    model = GPT2(dataclasses.replace(CONFIG, bos_token_id=None, eos_token_id=None))
    save_pretrained(folder, model, PARAMS)  # over a folder that has one
    assert not (folder / "generation_config.json").exists()
    assert load_pretrained(folder)[0] == model


@pytest.mark.parametrize("limit", [1, 1000, 2000])
def test_shards(folder, monkeypatch, limit):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", limit)
    save_pretrained(folder, MODEL, PARAMS)
    assert not (folder / "model.safetensors").exists()
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(weight_map.values()):
        tensors = load_file(folder / file)
        assert set(tensors) == {name for name in weight_map if weight_map[name] == file}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    assert_equal(load_pretrained(folder)[1], PARAMS)

    monkeypatch.undo()
    save_pretrained(folder, MODEL, random_params(MODEL, seed=1))
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert_equal(load_pretrained(folder)[1], random_params(MODEL, seed=1))


# What other programs write


def unprefixed(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_buffers(tensors):
    masks = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.uint8) for i in range(2)}
    return {**tensors, **masks, "h.0.attn.masked_bias": np.float32([-1e4])}


def with_tied_head(tensors):
    return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}


@pytest.mark.parametrize("change", [unprefixed, with_buffers, with_tied_head])
def test_variants_of_tensor_names(folder, change):
    edit_tensors(folder, change)
    assert_equal(load_pretrained(folder)[1], PARAMS)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float64])
def test_stored_types(folder, dtype):
    edit_tensors(folder, lambda tensors: {n: t.astype(dtype) for n, t in tensors.items()})
    params = load_pretrained(folder)[1]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert_equal(params, jax.tree.map(lambda x: np.asarray(x, dtype).astype(np.float32), PARAMS))


def test_unknown_configuration_keys_and_integers(folder):
    edit_config(folder, summary_type="cls_index", resid_pdrop=0, n_ctx=8)
    model, _ = load_pretrained(folder)
    assert model == MODEL
    assert type(model.config.resid_pdrop) is float


@pytest.mark.parametrize(("vocab_size", "eos"), [(50256, None), (50257, 50256)])
def test_silent_configurations_have_the_end_of_text_of_gpt2(tmp_path, vocab_size, eos):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "vocab_size": vocab_size}))
    config = huggingface.described_model(path).config
    assert (config.bos_token_id, config.eos_token_id) == (eos, eos)
    path.write_text(json.dumps({"model_type": "gpt2", "eos_token_id": None}))
    assert huggingface.described_model(path).config.eos_token_id is None
