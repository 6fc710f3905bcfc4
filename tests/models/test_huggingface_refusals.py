"""Folders in Hugging Face's format that are refused, and names on the hub."""

import json
import re
import sys
import types

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import folders
from rlhf_jax.models.huggingface import (
    load_pretrained,
    load_reward_model,
)
from tests.models.gpt2_folders import (
    PARAMS,
    adding,
    assert_equal,
    assert_one_sentence,
    edit_config,
    edit_tensors,
    without,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert', but only 'gpt2', 'llama', "),
        ({"model_type": None}, "model_type is None"),
        ({"activation_function": "silu"}, "must be gelu_new, gelu_pytorch_tanh, gelu or relu, but"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, but only True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"tie_word_embeddings": False}, r"lacks the tensor 'lm_head.weight' \(1 missing"),
        ({"n_embd": "8"}, 'n_embd must be an integer, but is "8"'),
        ({"n_embd": True}, "n_embd must be an integer, but is true"),
        ({"n_layer": None}, "n_layer must be an integer, but is null"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id must be an integer or null, but is \[1, 2\]"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a number"),
        ({"activation_function": 3}, "activation_function must be a string, but is 3"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head"),
        ({"n_inner": 16}, r"'transformer.h.0.mlp.c_fc.bias' has shape \[12\], .* needs \[16\]"),
        ({"vocab_size": 12}, r"'transformer.wte.weight' has shape \[11, 8\], .* \[12, 8\]"),
        (
            {"n_layer": 1},
            r"'transformer.h.1.attn.c_attn.bias' \[24\] is no part of the GPT-2 .* check its num",
        ),
        ({"n_layer": 3}, r"lacks the tensor 'h.2.attn.c_attn.bias' \(12 missing in all\)"),
        # Before anything of these sizes is computed.
        ({"n_layer": 10**9}, "has n_layer 1000000000, but the number of tensors .* is 28"),
        ({"n_embd": 10**9}, "has n_embd 1000000000, but the longest axis of a tensor .* is 24"),
        ({"vocab_size": 10**9}, "has vocab_size 1000000000, but the longest axis .* is 24"),
        ({"n_positions": 10**9}, r"'transformer.wpe.weight' has .* needs \[1000000000, 8\]"),
        ({"n_positions": 10**99}, "n_positions must be at most 2147483647, but is 1000"),
        ({"n_inner": 0}, "config.n_inner must be above 0, but is 0"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon must be above 0, but is -1e-05"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon must be above 0, but is 0.0"),
        ({"layer_norm_epsilon": np.nan}, "layer_norm_epsilon must be a finite number, but is nan"),
        ({"initializer_range": np.inf}, "initializer_range must be a finite number, but is inf"),
        ({"initializer_range": 10**400}, "initializer_range must be a finite number, but is inf"),
        ({"resid_pdrop": np.nan}, "resid_pdrop must be a finite number, but is nan"),
        ({"pad_token_id": "1"}, "pad_token_id must be an integer, a list of integers or null, bu"),
    ],
)
def test_configurations_that_cannot_be_represented(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(folder)
    assert str(folder) in str(error.value)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("transformer.ln_f.bias"), r"lacks the tensor 'ln_f.bias' \(1 missing in all\)"),
        (adding("transformer.h.0.adapter", np.ones(3, np.float32)), r"'transformer.h.0.adapter'"),
        (adding("lm_head.weight", np.ones((11, 8), np.float32)), "'lm_head.weight' differs from"),
        (adding("lm_head.weight", np.ones((9, 8), np.float32)), r"'lm_head.weight' has shape \[9"),
        (adding("ln_f.bias", np.ones(8, np.float32)), "holds the tensor 'ln_f.bias' twice"),
        (adding("transformer.ln_f.bias", np.ones(8, np.int8)), "'transformer.ln_f.bias' .* as I8"),
        (adding("score.weight", np.ones((1, 8), np.float32)), "load it with load_reward_model"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(folder)
    assert str(folder) in str(error.value)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, np.float32), (-np.inf, np.float32), (np.inf, np.float16), (1e300, np.float64)],
)
def test_weights_that_are_not_finite(folder, reward_folder, value, dtype):
    def broken(tensors):
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        name = "score.weight" if "score.weight" in tensors else "transformer.h.1.mlp.c_fc.weight"
        tensors[name].flat[-1] = value
        return tensors

    for path, load, name in (
        (folder, load_pretrained, "transformer.h.1.mlp.c_fc.weight"),
        (reward_folder, load_reward_model, "score.weight"),
    ):
        edit_tensors(path, broken)
        with pytest.raises(
            InputError, match=f"the tensor '{name}' holds values .* not finite"
        ) as e:
            load(path)
        assert_one_sentence(e)


def only_pytorch(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def broken_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def lost_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of(name):
    def change(folder):
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"weight_map": {"wte.weight": name.replace("FOLDER", str(folder.parent))}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), r"config.json is not JSON \("),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), r"config.json is not JSON \("),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json is not a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "safetensors cannot be read"),
        (only_pytorch, r"pytorch_model.bin only.* convert it .*save_pretrained\(folder\)"),
        (broken_index, "has no weight_map"),
        (lost_shard, "lacks model-00001-of-00002.safetensors, which its .*index.json names"),
        (index_of("../outside.safetensors"), "names '.*outside.safetensors', but weights are"),
        (index_of("FOLDER/outside.safetensors"), "names '.*outside.safetensors', but weights are"),
        (index_of("config.json"), "names '.*config.json', but weights are safetensors files in"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), r"config.json is not JSON \("),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(folder)
    assert str(folder) in str(error.value)
    assert_one_sentence(error)


def test_a_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="cannot be read"):
        load_pretrained(folder)


# Names on the hub


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "a/b/c", "two words"])
def test_names_of_neither_a_folder_nor_a_hub_model(name):
    with pytest.raises(InputError, match=f"There is no folder {re.escape(name)}; give one"):
        load_pretrained(name)


def test_a_file_is_no_folder(folder):
    with pytest.raises(InputError, match="config.json is a file; give the folder"):
        load_pretrained(folder / "config.json")


def test_hub_names_are_fetched(folder, monkeypatch):
    def snapshot_download(name, *, allow_patterns):
        assert name == "owner/name"
        assert allow_patterns == [
            "config.json",
            "generation_config.json",
            "model*.safetensors",
            folders.INDEX,
        ]
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_equal(load_pretrained("owner/name")[1], PARAMS)


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_a_hub_that_cannot_be_reached(monkeypatch, kind):
    def snapshot_download(name, *, allow_patterns):
        raise kind("no route\nto the hub")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(InputError, match=f"no folder gpt2, .*{kind.__name__}: no route") as error:
        load_pretrained("gpt2")
    assert_one_sentence(error)


def test_hub_names_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub, or give a local") as error:
        load_pretrained("gpt2")
    assert_one_sentence(error)
