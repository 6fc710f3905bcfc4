"""Ids of special tokens: of the tokenizer, and with them those of both configurations."""

import dataclasses
import json
import logging

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.huggingface import (
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from rlhf_jax.models.special_tokens import with_special_tokens
from tests.models.gpt2_folders import (
    CONFIG,
    HEAD,
    MODEL,
    PARAMS,
    assert_one_sentence,
    word_tokenizer,
)


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "saved", MODEL, PARAMS)
    return tmp_path / "saved"


def write(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))


def read(folder, name="generation_config.json"):
    return json.loads((folder / name).read_text())


def tokenizer(**special):
    """With eos 1 and the special tokens 0 and 4, of which 4 is marked in tokenizer.json alone."""
    result = word_tokenizer(11, **special)
    from tokenizers import AddedToken

    result.backend_tokenizer.add_special_tokens(
        [AddedToken("<|bos|>", special=True), AddedToken("w4", special=True)]
    )
    return result


def test_a_generation_config_comes_out_as_it_came_in(folder, tmp_path):
    values = {"eos_token_id": [3, 1, 7], "repetition_penalty": 1.1, "some_key": {"a": None}}
    write(folder, **values)
    model, params = load_pretrained(folder)
    assert model.stop_token_ids == (3, 1, 7)
    assert model == MODEL
    assert hash(model) == hash(MODEL)
    save_pretrained(tmp_path / "again", model, params)
    assert read(tmp_path / "again") == values


def test_ids_are_those_of_the_tokenizer(folder, tmp_path, caplog):
    write(folder, bos_token_id=0, eos_token_id=[0, 1, 4, 5], pad_token_id=9, temperature=0.6)
    config = dataclasses.replace(CONFIG, eos_token_id=5, pad_token_id=9)
    (folder / "config.json").write_text(
        json.dumps({**read(folder, "config.json"), "eos_token_id": 5, "pad_token_id": 9})
    )
    model, params = load_pretrained(folder)
    assert model.config == config
    with caplog.at_level(logging.WARNING):
        model = with_special_tokens(model, tokenizer(pad_token="w10"), "base")
    (record,) = caplog.records
    assert record.message == (
        "The model in base has other special tokens than its tokenizer, whose are used and "
        "exported: eos_token_id 5 and not 1, pad_token_id 9 and not 10, generation_config.json "
        "eos_token_id [0, 1, 4, 5] and not [1, 0, 4]."
    )
    assert model.config == dataclasses.replace(CONFIG, pad_token_id=10)
    assert model.stop_token_ids == (1, 0, 4)  # 5 is a word
    save_pretrained(tmp_path / "out", model, params)
    assert read(tmp_path / "out") == {
        "bos_token_id": 0,
        "eos_token_id": [1, 0, 4],
        "pad_token_id": 10,
        "temperature": 0.6,
    }
    written = read(tmp_path / "out", "config.json")
    assert (written["eos_token_id"], written["pad_token_id"]) == (1, 10)


def test_equal_or_missing_ids_are_no_warning(folder, caplog):
    model, _ = load_pretrained(folder)
    assert model.stop_token_ids == (1,)
    for each in (model, GPT2(dataclasses.replace(CONFIG, eos_token_id=None))):
        again = with_special_tokens(each, tokenizer(), "base")
        assert again.config == CONFIG
        assert again.stop_token_ids == (1,)
    assert not caplog.records
    assert GPT2(dataclasses.replace(CONFIG, eos_token_id=None)).stop_token_ids == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": [1, 1.5]}, r"eos_token_id must be an .* or null, but is \[1, 1.5\]."),
        ({"bos_token_id": "1"}, "bos_token_id must be an integer, .* or null, but is '1'."),
        ({"pad_token_id": True}, "pad_token_id must be an integer, .* or null, but is True."),
    ],
)
def test_ids_that_are_no_integers(folder, values, message):
    write(folder, **values)
    with pytest.raises(InputError, match=f"generation_config.json: {message}") as error:
        load_pretrained(folder)
    assert_one_sentence(error)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(InputError, match="generation_config.json is not a JSON object"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("special", "pad", "expected"),
    [
        ({"pad_token": "w10"}, 9, (10, "w10")),  # the tokenizer's, whatever the model declares
        ({}, 9, (9, "w9")),  # the model's, where the tokenizer has none
        ({"pad_token": "<|endoftext|>"}, 9, (9, "w9")),
        ({}, 1, (11, "<|pad|>")),
        ({}, None, (11, "<|pad|>")),
    ],
)
def test_the_pad_token_of_a_reward_model(tmp_path, special, pad, expected):
    model = GPT2(dataclasses.replace(CONFIG, pad_token_id=pad))
    words = word_tokenizer(11, **special)
    save_reward_model(tmp_path, model, {"model": PARAMS, "head": HEAD}, words)
    saved = type(words).from_pretrained(tmp_path)
    config = load_reward_model(tmp_path)[0].config
    assert (saved.pad_token_id, saved.pad_token) == expected
    assert config.pad_token_id == expected[0]


def test_ids_outside_of_the_vocabulary_are_left_out_with_a_warning(folder, caplog):
    """transformers writes its defaults, 50256 for a GPT-2 of any vocabulary, and -1 for none."""
    write(folder, eos_token_id=[1, 50256], pad_token_id=-1)
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": 50256, "pad_token_id": -1}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_pretrained(folder)
    assert (model.config.bos_token_id, model.config.pad_token_id) == (None, None)
    assert model.generation_config["eos_token_id"] == [1]
    assert caplog.text.count("is not in the vocabulary") == 4
