"""Tokenizers: round trips, determinism, saved folders, and messages for users."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import builtin, load_tokenizer, train_tokenizer
from rlhf_jax.data.settings import TokenizerSettings
from rlhf_jax.data.tokenizers import EOS_TOKEN, PAD_TOKEN
from rlhf_jax.errors import InputError

TOKENIZER = train_tokenizer(["the film was superb", "the film was dull"] * 5, 300)
ODD = "Hello , it 's  a test .\n\n\tÄrger 漢字 🙂 \x00 é"


@given(st.text())
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_special_tokens_are_the_last_and_never_written_by_plain_text():
    assert len(TOKENIZER) <= 300
    assert TOKENIZER.eos_token == TOKENIZER.bos_token == EOS_TOKEN
    assert TOKENIZER.pad_token == PAD_TOKEN
    assert TOKENIZER.eos_token_id == len(TOKENIZER) - 1
    assert TOKENIZER.pad_token_id == len(TOKENIZER) - 2
    assert not {TOKENIZER.eos_token_id, TOKENIZER.pad_token_id} & set(TOKENIZER(ODD)["input_ids"])


def test_training_is_deterministic_and_learns_the_words():
    texts = [example["completion"] for example in builtin.texts(0, 200)]
    first, second = train_tokenizer(texts, 400), train_tokenizer(iter(texts), 400)
    assert len(first) == 400
    assert first.get_vocab() == second.get_vocab()
    assert first(ODD)["input_ids"] == second(ODD)["input_ids"]
    assert len(first(" The acting was superb.")["input_ids"]) < 12


def test_a_saved_folder_opens_anywhere_and_encodes_the_same(tmp_path):
    import transformers

    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in config
    assert (tmp_path / "tokenizer.json").exists()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for opened in (
        load_tokenizer(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        assert opened(ODD)["input_ids"] == TOKENIZER(ODD)["input_ids"]
        assert opened.decode(opened(ODD)["input_ids"]) == ODD
        assert opened.eos_token_id == TOKENIZER.eos_token_id
        assert opened.pad_token_id == TOKENIZER.pad_token_id


def test_vocab_and_merges_of_gpt2_open_and_are_saved_in_one_file(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    model = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    vocab[EOS_TOKEN] = len(vocab)
    (old / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (old / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (old / "config.json").write_text('{"model_type": "gpt2"}')
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    loaded = load_tokenizer(old)
    assert loaded(ODD)["input_ids"] == TOKENIZER(ODD)["input_ids"]
    assert loaded.eos_token == EOS_TOKEN
    loaded.save_pretrained(new)
    assert load_tokenizer(new)(ODD)["input_ids"] == loaded(ODD)["input_ids"]


def test_chat_template_and_further_special_tokens_survive(tmp_path):
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    import transformers

    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer,
        eos_token=EOS_TOKEN,
        additional_special_tokens=["<|user|>"],
    )
    plain.chat_template = "{% for turn in messages %}<|user|>{{ turn['content'] }}{% endfor %}"
    plain.save_pretrained(first)
    loaded = load_tokenizer(first)
    loaded.save_pretrained(second)
    config = json.loads((second / "tokenizer_config.json").read_text())
    assert not isinstance(config.get("extra_special_tokens"), list)  # transformers 4 wants a dict
    again = load_tokenizer(second)
    again.save_pretrained(third)
    for tokenizer in (loaded, again, load_tokenizer(third)):
        assert tokenizer.chat_template == plain.chat_template
        assert tokenizer("<|user|>a")["input_ids"] == plain("<|user|>a")["input_ids"]
        assert len(tokenizer("<|user|>")["input_ids"]) == 1


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_every_setting_survives(tmp_path):
    import transformers

    first, second = tmp_path / "1", tmp_path / "2"
    TOKENIZER.save_pretrained(first)
    settings = {
        "padding_side": "left",
        "truncation_side": "left",
        "clean_up_tokenization_spaces": True,
        "model_max_length": 77,
        "split_special_tokens": True,
        "errors": "replace",
        "custom": {"key": [1, "a"]},
    }
    limits = {
        "truncation": {
            "direction": "Left",
            "max_length": 7,
            "strategy": "LongestFirst",
            "stride": 2,
        },
        "padding": {
            "strategy": {"Fixed": 9},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": TOKENIZER.pad_token_id,
            "pad_type_id": 0,
            "pad_token": PAD_TOKEN,
        },
    }
    edit(first / "tokenizer_config.json", **settings)
    edit(first / "tokenizer.json", **limits)
    loaded = load_tokenizer(first)
    assert loaded.decode(loaded("a , b")["input_ids"]) == "a , b"  # which a clean-up would change
    loaded(["a", "a b"], padding=True, truncation=True, max_length=1)
    loaded.save_pretrained(second)
    before, after = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (first, second)
    )
    assert {key: after[key] for key in before} == before
    file = json.loads((second / "tokenizer.json").read_text())
    assert {key: file[key] for key in limits} == limits
    opened = transformers.AutoTokenizer.from_pretrained(second)
    assert (opened.padding_side, opened.truncation_side) == ("left", "left")


@pytest.mark.parametrize("names", [None, ["input_ids"]])
def test_inputs_of_the_model_are_always_written(tmp_path, names):
    """Transformers 4 passes token types otherwise, which GPT-2 adds to its embeddings."""
    import transformers

    first, second = tmp_path / "1", tmp_path / "2"
    TOKENIZER.save_pretrained(first)
    config = json.loads((first / "tokenizer_config.json").read_text())
    assert config.pop("model_input_names") == ["input_ids", "attention_mask"]
    config |= {} if names is None else {"model_input_names": names}
    (first / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(first)
    loaded.save_pretrained(second)
    expected = names or ["input_ids", "attention_mask"]
    opened = transformers.AutoTokenizer.from_pretrained(second)
    assert opened.model_input_names == loaded.model_input_names == expected
    assert list(opened("a")) == list(loaded("a")) == expected


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"^There is no folder .*nowhere: give a folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is a file: give the folder that holds it"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_readable_tokenizer(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="holds no tokenizer that can be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_name(monkeypatch):
    import transformers

    def refuse(name):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(InputError, match="neither a local folder nor reachable .* offline, give"):
        load_tokenizer("someone/some-model")


def test_a_tokenizer_without_an_end(tmp_path):
    import transformers

    transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_settings_are_checked():
    with pytest.raises(InputError, match=r"tokenizer.vocab_size is 257, .* at least 258"):
        TokenizerSettings(vocab_size=257)
    with pytest.raises(InputError, match="vocab_size is 10"):
        train_tokenizer(["a"], 10)
    with pytest.raises(InputError, match=r"tokenizer.path is empty"):
        TokenizerSettings(path=" ")


def test_without_texts_there_are_still_the_bytes():
    tokenizer = train_tokenizer([], 300)
    assert len(tokenizer) == 258
    assert tokenizer.decode(tokenizer(ODD)["input_ids"]) == ODD
