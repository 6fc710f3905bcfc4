"""Folders in Hugging Face's format: reading, writing, and refusals."""

import dataclasses
import json
import re
import resource
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

from rlhf_jax.errors import InputError
from rlhf_jax.models import folders, huggingface, writing
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.huggingface import (
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)

CONFIG = GPT2Config(
    vocab_size=11,
    n_positions=8,
    n_embd=8,
    n_layer=2,
    n_head=2,
    n_inner=12,
    resid_pdrop=0.0,
    layer_norm_epsilon=1e-4,
    bos_token_id=0,
    eos_token_id=1,
)
TOKENS = np.array([[3, 4, 5, 1], [7, 1, 0, 0]], np.int32)
MASK = np.array([[True, True, True, True], [True, True, False, False]])


def random_params(model, seed=0):
    """Every leaf random, so that two that are swapped show; the padding of the vocabulary zero."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    wte = params["wte"]["embedding"]
    params["wte"]["embedding"] = wte.at[model.config.vocab_size :].set(0.0)
    return params


MODEL = GPT2(CONFIG)
PARAMS = random_params(MODEL)
HEAD = {"kernel": jnp.arange(1.0, 9.0)}


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "saved", MODEL, PARAMS)
    return tmp_path / "saved"


@pytest.fixture
def reward_folder(tmp_path):
    save_reward_model(tmp_path / "reward", MODEL, {"model": PARAMS, "head": HEAD})
    return tmp_path / "reward"


def named_tensors(params):
    """What the files hold of parameters, by the names in them."""
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


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({k: np.ascontiguousarray(v) for k, v in change(tensors).items()}, path)


def assert_equal(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def assert_one_sentence(error):
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message


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


def score(model, params):
    hidden = model.hidden(params["model"], TOKENS, MASK)
    return hidden[np.arange(2), MASK.sum(axis=1) - 1] @ params["head"]["kernel"]


def test_reward_model_gets_a_pad_token_of_its_own(reward_folder):
    model, params = load_reward_model(reward_folder)
    assert model.config == dataclasses.replace(CONFIG, vocab_size=12, pad_token_id=11)
    expected = {"model": PARAMS, "head": HEAD}
    assert_equal(params, expected)
    np.testing.assert_array_equal(score(model, params), score(MODEL, expected))
    tensors = load_file(reward_folder / "model.safetensors")
    assert tensors["score.weight"].shape == (1, 8)
    assert tensors["transformer.wte.weight"].shape == (12, 8)
    assert not tensors["transformer.wte.weight"][11].any()
    config = json.loads((reward_folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"}
    assert not (reward_folder / "generation_config.json").exists()


def test_vectors_that_pad_the_vocabulary_are_not_exported(tmp_path):
    wte = PARAMS["wte"]["embedding"].at[CONFIG.vocab_size :].set(7.0)
    params = {"model": {**PARAMS, "wte": {"embedding": wte}}, "head": HEAD}
    save_reward_model(tmp_path / "reward", MODEL, params)
    assert_equal(load_reward_model(tmp_path / "reward")[1]["model"], PARAMS)
    save_pretrained(tmp_path / "model", MODEL, params["model"])
    assert_equal(load_pretrained(tmp_path / "model")[1], PARAMS)


def test_reward_model_whose_pad_token_was_eos(tmp_path):
    model = GPT2(dataclasses.replace(CONFIG, pad_token_id=CONFIG.eos_token_id))
    save_reward_model(tmp_path, model, {"model": PARAMS, "head": HEAD})
    assert load_reward_model(tmp_path)[0].config.pad_token_id == 11


@pytest.mark.parametrize("pad", [2, 10])
def test_reward_model_keeps_a_pad_token_that_is_not_eos(tmp_path, pad):
    model = GPT2(dataclasses.replace(CONFIG, pad_token_id=pad))
    save_reward_model(tmp_path, model, {"model": PARAMS, "head": HEAD})
    again, params = load_reward_model(tmp_path, dtype="bfloat16")
    assert again == GPT2(model.config, "bfloat16")
    assert_equal(params, {"model": PARAMS, "head": HEAD})


def test_the_vector_of_the_pad_token_may_start_a_new_block_of_128(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=128)
    params = {"model": random_params(GPT2(config)), "head": HEAD}
    save_reward_model(tmp_path, GPT2(config), params)
    model, again = load_reward_model(tmp_path)
    assert model.config.vocab_size == 129
    assert again["model"]["wte"]["embedding"].shape == (256, 8)
    np.testing.assert_array_equal(
        again["model"]["wte"]["embedding"][:128], params["model"]["wte"]["embedding"]
    )


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


# What is refused


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
        ({"n_inner": 16}, r"'transformer.h.0.mlp.c_fc.bias' has shape \[12\], .* asks for \[16\]"),
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
        ({"n_positions": 10**9}, r"'transformer.wpe.weight' has .* asks for \[1000000000, 8\]"),
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


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def adding(name, tensor):
    return lambda tensors: {**tensors, name: tensor}


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("score.weight"), "has no tensor 'score.weight', so it is no reward model"),
        (adding("score.weight", np.ones((2, 8), np.float32)), r"\[2, 8\], but a reward model has"),
        (
            adding("score.weight", np.ones((1, 9), np.float32)),
            r"\[1, 9\], but .* asks for \[1, 8\]",
        ),
        (adding("score.bias", np.ones(1, np.float32)), r"'score.bias' \[1\] is no part"),
    ],
)
def test_reward_heads_that_do_not_fit(reward_folder, change, message):
    edit_tensors(reward_folder, change)
    with pytest.raises(InputError, match=message) as error:
        load_reward_model(reward_folder)
    assert_one_sentence(error)


def test_a_language_model_is_no_reward_model(folder):
    with pytest.raises(InputError, match="so it is no reward model"):
        load_reward_model(folder)


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


# Writing


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_changes_nothing(folder, monkeypatch, interruption):
    before = contents(folder)

    def half_written(path, shapes, tensors):
        path.write_bytes(b"half")
        raise interruption

    monkeypatch.setattr(writing, "write_safetensors", half_written)
    with pytest.raises(interruption):
        save_pretrained(folder, MODEL, random_params(MODEL, seed=1))
    assert contents(folder) == before


def test_a_save_cut_short_among_shards_leaves_no_mixture(folder, monkeypatch):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 2000)
    save_pretrained(folder, MODEL, PARAMS)
    replace = huggingface.pathlib.Path.replace

    def replace_but_the_third(path, target):
        if path.name.startswith("model-00003"):
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(huggingface.pathlib.Path, "replace", replace_but_the_third)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(folder, MODEL, random_params(MODEL, seed=1))
    with pytest.raises(InputError, match="holds neither"):
        load_pretrained(folder)


def test_weights_are_moved_into_place_last(tmp_path, monkeypatch):
    moved, replace = [], huggingface.pathlib.Path.replace
    monkeypatch.setattr(
        huggingface.pathlib.Path,
        "replace",
        lambda path, target: moved.append(path.name) or replace(path, target),
    )
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 4000)
    save_pretrained(tmp_path, MODEL, PARAMS, FolderTokenizer())
    assert moved == [
        "config.json",
        "generation_config.json",
        "chat.jinja",
        "tokenizer.json",
        *sorted(path.name for path in tmp_path.glob("*.safetensors")),
        "model.safetensors.index.json",
    ]


def test_a_full_disk_is_an_oserror(folder):
    before = contents(folder)
    # A limit on the size of files ends a write as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = len(before["model.safetensors"]) - 1
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            save_pretrained(folder, MODEL, PARAMS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(folder) == before


def test_folders_that_cannot_be_written(folder):
    with pytest.raises(OSError, match="config.json"):
        save_pretrained(folder / "config.json" / "below", MODEL, PARAMS)
    with pytest.raises(InputError, match="gs://bucket/model is an address"):
        save_pretrained("gs://bucket/model", MODEL, PARAMS)


def test_other_files_of_the_folder_stay(folder):
    (folder / "README.md").write_text("mine")
    save_pretrained(folder, MODEL, PARAMS)
    assert (folder / "README.md").read_text() == "mine"


def test_parameters_of_another_model_are_refused(tmp_path):
    other = GPT2(dataclasses.replace(CONFIG, n_layer=3))
    message = r"params\['layers'\].* must have shape \(3, 3, 8\), but has \(2, 3, 8\)"
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path, other, PARAMS)
    rest = {key: value for key, value in PARAMS.items() if key != "ln_f"}
    with pytest.raises(ValueError, match=r"params\['ln_f'\]\['bias'\] .* but has None"):
        save_pretrained(tmp_path, MODEL, rest)
    head = {**HEAD, "scale": jnp.zeros(())}
    with pytest.raises(ValueError, match=r"reward head .* but has \['kernel', 'scale'\]"):
        save_reward_model(tmp_path, MODEL, {"model": PARAMS, "head": head})
    assert not any(tmp_path.iterdir())


# Tokenizers


class FolderTokenizer:
    """A tokenizer with the one method that is called."""

    def save_pretrained(self, folder):
        path = huggingface.pathlib.Path(folder)
        (path / "tokenizer.json").write_text("{}")
        (path / "templates").mkdir()
        (path / "templates" / "chat.jinja").write_text("")


def test_the_tokenizer_is_written_too(folder):
    save_pretrained(folder, MODEL, PARAMS, FolderTokenizer())
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "templates" / "chat.jinja").exists()
    assert not list(folder.glob(".saving*"))


def word_tokenizer(size, **special):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {"<|bos|>": 0, "<|endoftext|>": 1} | {f"w{i}": i for i in range(2, size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", padding_side="left", **special
    )


@pytest.mark.parametrize("special", [{}, {"pad_token": "<|endoftext|>"}])
def test_the_tokenizer_of_a_reward_model_learns_the_new_pad_token(tmp_path, special):
    tokenizer = word_tokenizer(11, **special)
    before = tokenizer.pad_token, len(tokenizer)
    save_reward_model(tmp_path, MODEL, {"model": PARAMS, "head": HEAD}, tokenizer)
    assert (tokenizer.pad_token, len(tokenizer)) == before
    assert tokenizer.padding_side == "left"
    model, _ = load_reward_model(tmp_path)
    saved = type(tokenizer).from_pretrained(tmp_path)
    assert (saved.pad_token, saved.pad_token_id, saved.padding_side) == ("<|pad|>", 11, "right")
    assert (model.config.vocab_size, model.config.pad_token_id) == (12, 11)
    assert saved(["w3 w4", "w5"], padding=True)["input_ids"] == [[3, 4], [5, 11]]


def test_a_pad_token_of_the_tokenizer_becomes_the_models(tmp_path):
    tokenizer = word_tokenizer(11, pad_token="w10")
    save_reward_model(tmp_path, MODEL, {"model": PARAMS, "head": HEAD}, tokenizer)
    model, params = load_reward_model(tmp_path)
    assert model.config == dataclasses.replace(CONFIG, pad_token_id=10)
    assert_equal(params["model"], PARAMS)


@pytest.mark.parametrize(
    ("size", "special", "pad", "message"),
    [
        (13, {}, None, "pad token has the id 13, but the vocabulary of the model ends at 10"),
    ],
)
def test_tokenizers_that_do_not_fit(tmp_path, size, special, pad, message):
    tokenizer = word_tokenizer(size, **special)
    model = GPT2(dataclasses.replace(CONFIG, pad_token_id=pad))
    with pytest.raises(InputError, match=message) as error:
        save_reward_model(tmp_path, model, {"model": PARAMS, "head": HEAD}, tokenizer)
    assert_one_sentence(error)
    assert not any(tmp_path.iterdir())


# Classifiers with several labels


@pytest.mark.parametrize("label", [0, 1])
def test_the_logit_of_one_label_is_a_score(reward_folder, label):
    labels = np.stack([np.arange(8), -np.arange(8)]).astype(np.float32)
    edit_tensors(reward_folder, adding("score.weight", labels))
    _, params = load_reward_model(reward_folder, label=label)
    np.testing.assert_array_equal(params["head"]["kernel"], labels[label])


def test_a_label_is_one_of_the_classifiers(reward_folder):
    _, params = load_reward_model(reward_folder, label=0)  # the only one
    assert_equal(params["head"], load_reward_model(reward_folder)[1]["head"])
    with pytest.raises(InputError, match=r"shape \[1, 8\], so there is no label 1; the first"):
        load_reward_model(reward_folder, label=1)
    edit_tensors(reward_folder, adding("score.weight", np.ones((2, 8), np.float32)))
    with pytest.raises(InputError, match=r"label, \[1, 8\]; of a classifier choose the") as error:
        load_reward_model(reward_folder)
    assert_one_sentence(error)
    edit_tensors(reward_folder, adding("score.weight", np.ones((2, 9), np.float32)))
    with pytest.raises(InputError, match=r"\[1, 9\], but .* asks for \[1, 8\]"):
        load_reward_model(reward_folder, label=1)
