"""A second family: one file and one line in FAMILIES. On a mesh it runs in eight_devices.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from rlhf_jax.batches import Sequences, TextBatch
from rlhf_jax.errors import InputError
from rlhf_jax.models import (
    LoraSettings,
    huggingface,
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from rlhf_jax.models.adapter_folders import with_settings
from rlhf_jax.models.adapters import fresh_params
from rlhf_jax.models.interface import SharedPrompt, positions_from
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.parallel import MeshSettings, make_mesh, tree_shardings
from rlhf_jax.parallel.partition import partition_spec
from rlhf_jax.rollout import end_scores, generate
from rlhf_jax.training import sft
from tests.models import tiny_family
from tests.models.gpt2_folders import assert_equal
from tests.models.tiny_family import Tiny, TinyConfig

MODEL = Tiny(TinyConfig(eos_token_id=1))
PARAMS = MODEL.init(jax.random.key(0))


@pytest.fixture(autouse=True)
def families(monkeypatch):
    monkeypatch.setattr(huggingface, "FAMILIES", (*huggingface.FAMILIES, tiny_family.FAMILY))


def test_a_second_family_is_saved_and_loaded(tmp_path):
    save_pretrained(tmp_path, MODEL, PARAMS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("tiny", ["TinyForCausalLM"])
    assert (config["hidden_size"], config["num_key_value_heads"]) == (16, 2)
    tensors = load_file(tmp_path / "model.safetensors")
    kernel = PARAMS["layers"]["k"]["kernel"][1]
    np.testing.assert_array_equal(tensors["model.layers.1.k.weight"], np.asarray(kernel).T)
    model, params = load_pretrained(tmp_path)
    assert model == MODEL
    assert_equal(params, PARAMS)


def test_reward_models_of_a_second_family(tmp_path):
    tree = {"model": PARAMS, "head": {"kernel": jnp.arange(16.0)}}
    save_reward_model(tmp_path, MODEL, tree)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["TinyForSequenceClassification"]
    assert_equal(load_reward_model(tmp_path)[1], tree)


def test_fresh_models_of_a_second_family():
    settings = ModelSettings(n_layer=1, n_embd=32, remat="full")
    model = huggingface.fresh_model(settings, vocab_size=20, pad_token_id=3, model_type="tiny")
    assert isinstance(model, Tiny)
    assert (model.config.n_embd, model.config.pad_token_id, model.remat) == (32, 3, "full")
    with pytest.raises(InputError, match="'bert', but only 'gpt2', .*'tiny' is supported"):
        huggingface.fresh_model(settings, vocab_size=20, model_type="bert")


def test_key_value_heads_that_the_mesh_does_not_divide_are_an_error():
    mesh = type("Mesh", (), {"shape": {"data": 1, "fsdp": 1, "tensor": 4}})()
    with pytest.raises(InputError, match="num_key_value_heads = 2 heads of attention, which are"):
        MODEL.check_mesh(mesh)


def test_decoding_of_grouped_heads_equals_the_full_forward_pass():
    """Also in the stack that devices other than one CPU decode."""
    prompts = jnp.array([[0, 3, 4, 5], [7, 8, 9, 2]])
    mask = jnp.array([[False, True, True, True], [True] * 4])
    rollout = jax.jit(
        lambda params: generate(MODEL, params, prompts, mask, jax.random.key(1), max_new_tokens=5)
    )(PARAMS)
    tokens = jnp.concatenate([prompts, rollout.tokens], axis=1)
    mask = jnp.concatenate([mask, rollout.mask], axis=1)
    hidden = MODEL.hidden(PARAMS, tokens, mask)
    logprobs = jax.nn.log_softmax(MODEL.logits(PARAMS, hidden))[:, 3:-1]
    expected = jnp.take_along_axis(logprobs, rollout.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(rollout.logprobs, expected, rtol=1e-4, atol=1e-5)
    positions, cache, states = positions_from(mask), MODEL.init_cache(2, 9), []
    for at in (slice(0, 4), slice(4, 5), slice(5, 9)):
        x = MODEL.embed(PARAMS, tokens[:, at], positions[:, at])
        x, cache = MODEL.layers(PARAMS["layers"], x, mask[:, at], positions[:, at], cache)
        states.append(MODEL.final(PARAMS, x))
    states = jnp.concatenate(states, axis=1)
    np.testing.assert_allclose(states[mask], hidden[mask], rtol=1e-4, atol=1e-4)


def test_adapters_of_a_second_family_are_split_as_its_kernels():
    model = with_settings(MODEL, LoraSettings(r=2, init="pissa", use_dora=True))
    rules = model.partition_rules
    for name, width, outputs in (("q", "fsdp", "tensor"), ("down", "tensor", "fsdp")):
        for start in ("lora_", "lora_start_"):
            spec = partition_spec(f"layers/{name}/{start}a", 3, rules)
            assert spec == PartitionSpec(None, width, None)
            spec = partition_spec(f"opt_state/mu/layers/{name}/{start}b", 3, rules)
            assert spec == PartitionSpec(None, None, outputs)
        for scale in ("kernel_scale", "lora_magnitude"):
            assert partition_spec(f"layers/{name}/{scale}", 2, rules) == PartitionSpec()
    shapes = jax.eval_shape(lambda key: fresh_params(model, key), jax.random.key(0))
    mesh = make_mesh(MeshSettings(1, 1, 1), jax.devices()[:1])
    tree_shardings(mesh, shapes, rules)


def test_the_tied_embedding_of_a_second_family_is_not_trained_beside_adapters():
    with pytest.raises(InputError, match="modules_to_save names 'embed_tokens', whose matrix is"):
        with_settings(MODEL, LoraSettings(r=2, modules_to_save=("embed_tokens",)))


def test_a_second_family_names_its_unembedding():
    model = type("Untied", (Tiny,), {"untied": "output"})(TinyConfig(tie_word_embeddings=False))
    params = {**PARAMS, "output": {"embedding": 2 * PARAMS["tokens"]["embedding"]}}
    hidden = jnp.ones((1, 1, 16))
    np.testing.assert_allclose(
        model.logits(params, hidden), 2 * MODEL.logits(PARAMS, hidden), rtol=1e-6
    )
    assert model.without_unembedding(params).keys() == PARAMS.keys()


def test_responses_that_share_a_prompt_share_its_grouped_heads():
    prompts, responses = jnp.array([[3, 4, 5]]), jnp.array([[[6, 7], [8, 9]]])
    tree = {"model": PARAMS, "head": {"kernel": jnp.arange(16.0)}}
    sequences = Sequences(prompts, prompts > 0, responses, responses > 0)
    scores = end_scores(MODEL, tree, sequences)
    for response, score in zip(responses[0], scores[0], strict=True):
        text = jnp.concatenate([prompts, response[None]], axis=1)
        expected = MODEL.hidden(PARAMS, text)[0, -1] @ tree["head"]["kernel"]
        np.testing.assert_allclose(score, expected, rtol=1e-4)
    x = jnp.zeros((1, 7, 16))
    shared = SharedPrompt(3, 2)
    with pytest.raises(ValueError, match="one of the three"):
        MODEL.layers(
            PARAMS["layers"],
            x,
            x[..., 0] == 0,
            jnp.zeros((1, 7), int),
            MODEL.init_cache(1, 7),
            shared=shared,
        )


def test_a_second_family_trains_a_step():
    settings, key = sft.Settings(batch_size=2, dropout=False), jax.random.key(0)
    tokens = jnp.array([[3, 4, 5, 1], [6, 7, 1, 0]])
    batch = TextBatch(tokens, (tokens > 0).astype(jnp.int32), tokens > 0)
    state = sft.init_state(MODEL, PARAMS, settings, key)
    step = jax.jit(sft.make_step(MODEL, settings))
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, key)
        losses.append(float(metrics["train/loss"]))
    assert losses[0] > losses[-1]
