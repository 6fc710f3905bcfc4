"""GPT-2 against results of PyTorch's GPT-2 of transformers (tests/golden/make_gpt2.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from rlhf_jax import functional
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.huggingface import (
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from rlhf_jax.rollout.generation import generate

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    with np.load(GOLDEN / f"gpt2_{name}.npz") as file:
        return dict(file)


def write_folder(folder, config_key, names):
    """A folder as transformers would have saved it, in float16."""
    arrays = golden("weights")
    config = json.loads(str(arrays[config_key]))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: arrays[name] for name in arrays if name.startswith(names)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_model")
    return load_pretrained(write_folder(folder, "config", ("transformer.",)))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_model")
    return load_reward_model(write_folder(folder, "reward_config", ("transformer.", "score.")))


def logits_of(model, params, tokens, mask):
    return model.logits(params, model.hidden(params, tokens, mask))


def scores_of(model, params, tokens, mask):
    hidden = model.hidden(params["model"], tokens, mask)
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    return apply_head(params["head"], hidden[jnp.arange(len(last)), last])


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(language_model, side):
    model, params = language_model
    arrays = golden("logits")
    mask = arrays[f"{side}_mask"]
    logits = jax.jit(logits_of, static_argnums=0)(model, params, arrays[f"{side}_tokens"], mask)
    expected = arrays[f"{side}_logits"]
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-4)


def test_logits_in_bfloat16_come_close(language_model):
    model, params = language_model
    arrays = golden("logits")
    mask = arrays["left_mask"]
    logits = logits_of(GPT2(model.config, "bfloat16"), params, arrays["left_tokens"], mask)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - arrays["left_logits"])[mask]
    assert 1e-4 < error.mean() < 0.03


def test_greedy_tokens(language_model):
    model, params = language_model
    arrays = golden("greedy")
    rollout = generate(
        model,
        params,
        arrays["prompts"],
        arrays["prompt_mask"],
        jax.random.key(0),
        max_new_tokens=12,
        temperature=0,
    )
    np.testing.assert_array_equal(rollout.tokens, arrays["tokens"])
    assert rollout.mask.all()


def test_greedy_tokens_with_stops(language_model):
    model, params = language_model
    arrays = golden("greedy")
    stops = tuple(arrays["stop_token_ids"].tolist())
    rollout = generate(
        model,
        params,
        arrays["prompts"],
        arrays["prompt_mask"],
        jax.random.key(0),
        max_new_tokens=12,
        temperature=0,
        stop_token_ids=stops,
    )
    np.testing.assert_array_equal(rollout.tokens, arrays["stopped_tokens"])
    np.testing.assert_array_equal(rollout.mask.sum(axis=1), [12, 6, 9])


def language_model_loss(params, model, tokens, mask):
    logprobs = functional.token_logprobs(
        logits_of(model, params, tokens, mask)[:, :-1], tokens[:, 1:]
    )
    return -functional.masked_mean(logprobs, mask[:, 1:])


def test_ten_adamw_steps(language_model):
    model, params = language_model
    arrays = golden("training")
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)

    @jax.jit
    def step(params, state, tokens, mask):
        loss, grads = jax.value_and_grad(language_model_loss)(params, model, tokens, mask)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for i in range(10):
        batch = arrays["tokens"][i % 2], arrays["mask"][i % 2]
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, arrays["losses"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores(reward_model, side):
    model, params = reward_model
    arrays = golden("scores")
    scores = scores_of(model, params, arrays[f"{side}_tokens"], arrays[f"{side}_mask"])
    np.testing.assert_allclose(scores, arrays[f"{side}_scores"], rtol=0, atol=1e-4)


# With PyTorch installed: transformers opens written folders.


def transformers_inputs(torch, tokens, mask):
    return {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask.astype(np.int64)),
        "position_ids": torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0)),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 50_000])
def test_transformers_opens_our_language_model(
    language_model, tmp_path, monkeypatch, shard_bytes, side
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("rlhf_jax.models.writing.MAX_SHARD_BYTES", shard_bytes)
    model, params = language_model
    save_pretrained(tmp_path, model, params)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == model.config.eos_token_id
    arrays = golden("logits")
    tokens, mask = arrays[f"{side}_tokens"], arrays[f"{side}_mask"]
    with torch.no_grad():
        logits = theirs.eval()(**transformers_inputs(torch, tokens, mask)).logits.numpy()
    ours = logits_of(model, params, tokens, mask)
    np.testing.assert_allclose(logits[mask], ours[mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pad", [None, "eos", 2])
def test_transformers_opens_our_reward_model(reward_model, tmp_path, pad):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params = reward_model
    pad_token_id = model.config.eos_token_id if pad == "eos" else pad
    config = model.config.__class__(**{**vars(model.config), "pad_token_id": pad_token_id})
    save_reward_model(tmp_path, GPT2(config), params)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == (2 if pad == 2 else config.vocab_size)
    arrays = golden("scores")
    for side in ("left", "right"):
        mask = arrays[f"{side}_mask"]
        tokens = arrays[f"{side}_tokens"].copy()
        last = np.where(mask, np.arange(mask.shape[1]), 0).max(axis=1)
        tokens[np.arange(len(last)), last] = config.eos_token_id  # the score is read at EOS
        padded = np.where(mask, tokens, theirs.config.pad_token_id)
        with torch.no_grad():
            scores = theirs.eval()(**transformers_inputs(torch, padded, mask)).logits.numpy()
        ours = scores_of(model, params, tokens, mask)
        np.testing.assert_allclose(scores[:, 0], ours, rtol=0, atol=1e-4)
