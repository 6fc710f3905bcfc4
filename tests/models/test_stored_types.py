"""Folders in bfloat16 and float16: written as they were read, and in float32 after training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.batches import TextBatch
from rlhf_jax.models import writing
from rlhf_jax.models.family import Slot
from rlhf_jax.models.folders import INDEX
from rlhf_jax.models.huggingface import (
    FAMILIES,
    fresh_model,
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.models.stored_types import written_types
from rlhf_jax.training import sft
from tests.versions import newest

TYPES = {"bfloat16": jnp.bfloat16, "float16": np.float16}
UNKNOWN = {"transformers_version": "9.9", "mystery": {"depth": [1, None]}}
SETTINGS = ModelSettings(n_positions=8, n_embd=16, n_layer=2, n_head=2, dropout=0.0)


def model_of(family):
    return fresh_model(
        SETTINGS, vocab_size=11, model_type=family, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )


def stored_folder(folder, family, dtype, *, is_reward=False):
    """A folder as transformers writes it: its tensors in a type, its own keys in config.json."""
    model = model_of(family)
    params = model.init(jax.random.key(0))
    if is_reward:
        head = {"kernel": jnp.linspace(-1.0, 1.0, 16)}
        save_reward_model(folder, model, {"model": params, "head": head})
    else:
        save_pretrained(folder, model, params)
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    save_file({k: v.astype(TYPES[dtype]) for k, v in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps({**config, **UNKNOWN, "dtype": dtype}))


def tensors_of(folder):
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bytes(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        assert tensor.tobytes() == other[name].tobytes()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt2", "bfloat16"),
        ("llama", "float16"),
        *newest(
            *((each.model_type, "bfloat16") for each in FAMILIES if each.model_type != "gpt2"),
            *((name, "float16") for name in ("gpt2", "phi3")),
        ),
    ],
)
def test_frozen_tensors_are_written_as_they_were_read(tmp_path, family, dtype):
    one, other = tmp_path / "one", tmp_path / "other"
    stored_folder(one, family, dtype)
    model, params = load_pretrained(one)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    save_pretrained(other, model, params)
    assert_same_bytes(tensors_of(one), tensors_of(other))
    before, after = (json.loads((each / "config.json").read_text()) for each in (one, other))
    assert after.pop("torch_dtype") == dtype  # read by transformers 4
    assert after == before
    again, same = load_pretrained(other)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_reward_models_are_written_as_they_were_read(tmp_path, family):
    one, other = tmp_path / "one", tmp_path / "other"
    stored_folder(one, family, "bfloat16", is_reward=True)
    model, params = load_reward_model(one)
    save_reward_model(other, model, params)
    assert_same_bytes(tensors_of(one), tensors_of(other))
    assert json.loads((other / "config.json").read_text())["mystery"] == UNKNOWN["mystery"]
    # A trained head makes all of it float32.
    head = {"kernel": params["head"]["kernel"] + 1e-5}
    save_reward_model(other, model, {**params, "head": head})
    assert {tensor.dtype for tensor in tensors_of(other).values()} == {np.dtype(np.float32)}


def test_shards_are_read_and_written_in_their_types(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    stored_folder(one, "llama", "bfloat16")
    model, params = load_pretrained(one)
    limit = max(tensor.nbytes for tensor in tensors_of(one).values()) + 64
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", limit)
    save_pretrained(other, model, params)
    index = json.loads((other / INDEX).read_text())
    tensors = tensors_of(other)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    sizes = [
        sum(tensor.nbytes for tensor in load_file(other / file).values())
        for file in set(index["weight_map"].values())
    ]
    assert len(sizes) > 2
    assert max(sizes) <= limit
    assert_same_bytes(tensors_of(one), tensors)
    monkeypatch.undo()
    again, params = load_pretrained(other)
    save_pretrained(tmp_path / "third", again, params)
    assert_same_bytes(tensors_of(one), tensors_of(tmp_path / "third"))


@pytest.mark.parametrize("family", ["gpt2", *newest("gemma3_text")])
def test_a_trained_model_is_written_in_float32(tmp_path, family):
    """Parameters and moments are float32 whatever the folder is; products are in the dtype."""
    stored_folder(tmp_path / "one", family, "bfloat16")
    model, params = load_pretrained(tmp_path / "one", dtype="bfloat16")
    settings = sft.Settings(dropout=False)
    optimizer = optax.adamw(1e-4)
    state = sft.init_state(model, params, settings, jax.random.key(0), optimizer=optimizer)
    tokens = np.array([[3, 4, 5, 6], [7, 8, 9, 2]], np.int32)
    real = np.ones(tokens.shape, bool)
    batch = TextBatch(tokens, real.astype(np.int32), real, None)
    step = jax.jit(sft.make_step(model, settings, optimizer=optimizer))
    assert model.hidden(params, tokens, real).dtype == jnp.bfloat16
    state, metrics = step(state, batch, jax.random.key(1))
    assert metrics["train/loss"].dtype == jnp.float32
    floats = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    save_pretrained(tmp_path / "two", model, state.params)
    tensors = tensors_of(tmp_path / "two")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float32")
    _, same = load_pretrained(tmp_path / "two")
    jax.tree.map(np.testing.assert_array_equal, state.params, same)


def test_a_folder_of_two_types_keeps_both(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    stored_folder(one, "llama", "bfloat16")
    tensors = {
        name: tensor.astype(np.float32) + np.float32(1e-5) if "norm" in name else tensor
        for name, tensor in tensors_of(one).items()
    }
    save_file(tensors, one / "model.safetensors")
    save_pretrained(other, *load_pretrained(one))
    assert_same_bytes(tensors, tensors_of(other))
    assert json.loads((other / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", jnp.bfloat16), ("F16", np.float16)])
def test_which_numbers_are_exact_in_a_type(kind, dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    rng = np.random.default_rng(0)
    near = every * (1 + rng.choice([0, 2.0**-9, 2.0**-12, 2.0**-23], every.shape)).astype("f4")
    edges = np.float32([0.0, -0.0, 65504, 65520, 1e30, 6e-8, 5.96e-8, 1.5 * 2.0**-24, 1 / 3])
    slots, stored = {"x": Slot(("x",), None, (1,))}, {"x": kind}
    assert written_types(stored, slots, {"x": jnp.asarray(every)}) == stored
    values = np.concatenate([rng.choice(near, 100), edges])
    values = values[(np.abs(values) >= np.finfo(np.float32).tiny) | (values == 0)]
    for value in values:
        with np.errstate(over="ignore"):
            exact = np.float32(value) == np.asarray(value, dtype).astype(np.float32)
        types = written_types(stored, slots, {"x": jnp.asarray([value])})
        assert types == {"x": kind if exact else "F32"}, value


def test_models_of_other_types_are_equal():
    model = model_of("llama")
    other = dataclasses.replace(model, stored_types={"norm.weight": "BF16"})
    assert (model, hash(model)) == (other, hash(other))
