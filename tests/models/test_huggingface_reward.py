"""Reward models in Hugging Face's format: head, pad token, tokenizer, labels."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.huggingface import (
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from tests.models.gpt2_folders import (
    CONFIG,
    HEAD,
    MASK,
    MODEL,
    PARAMS,
    TOKENS,
    adding,
    assert_equal,
    assert_one_sentence,
    edit_tensors,
    random_params,
    without,
    word_tokenizer,
)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("score.weight"), "has no tensor 'score.weight', so it is no reward model"),
        (adding("score.weight", np.ones((2, 8), np.float32)), r"\[2, 8\], but a reward model has"),
        (
            adding("score.weight", np.ones((1, 9), np.float32)),
            r"\[1, 9\], but .* needs \[1, 8\]",
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
    with pytest.raises(InputError, match=r"\[1, 9\], but .* needs \[1, 8\]"):
        load_reward_model(reward_folder, label=1)
