"""Texts as examples: target tokens, truncation, and packing."""

import dataclasses
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import builtin, encode_texts, tokenize_texts
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.sft import pack
from rlhf_jax.errors import InputError
from tests.data.texts import ids, turns

UNPACKED = {"packing": False}


def encode_one(example, tokenizer, **settings):
    """(tokens, target tokens) of a single example."""
    batch = encode_texts([example], tokenizer, DataSettings(**UNPACKED, **settings))
    real = batch.segments[0] > 0
    return batch.tokens[0][real].tolist(), batch.tokens[0][batch.loss_mask[0]].tolist()


def test_a_text_gets_eos_and_its_first_token_is_no_target(tokenizer):
    expected = [*ids(tokenizer, "The acting was superb."), tokenizer.eos_token_id]
    tokens, targets = encode_one({"text": "The acting was superb."}, tokenizer)
    assert tokens == expected
    assert targets == expected[1:]


def test_eos_is_not_repeated(tokenizer):
    text = "The acting was superb."
    assert encode_one({"text": text}, tokenizer) == encode_one(
        {"text": text + "<|endoftext|>"}, tokenizer
    )


@pytest.mark.parametrize("completion_only", [True, False])
def test_prompt_and_completion(tokenizer, completion_only):
    example = {"prompt": "I saw The Golden River.", "completion": " I loved it."}
    prompt = ids(tokenizer, example["prompt"])
    completion = [*ids(tokenizer, example["completion"]), tokenizer.eos_token_id]
    tokens, targets = encode_one(example, tokenizer, completion_only=completion_only)
    assert tokens == prompt + completion
    assert targets == (completion if completion_only else prompt[1:] + completion)


def test_the_first_token_is_no_target_even_in_a_completion(tokenizer):
    tokens, targets = encode_one({"prompt": "", "completion": " I loved it."}, tokenizer)
    assert targets == tokens[1:]


def test_a_long_text_loses_its_right_end_and_eos(tokenizer, caplog):
    text = "The acting was superb. The plot was dull."
    tokens, _ = encode_one({"text": text}, tokenizer, max_length=8)
    assert tokens == ids(tokenizer, text)[:8]
    assert len(caplog.records) == 1
    assert "1 of 1 texts lost their right end" in caplog.text


def test_prompts_lose_their_left_and_completions_their_right_end(tokenizer, caplog):
    example = {"prompt": "I saw The Golden River.", "completion": " The acting was superb."}
    prompt, completion = (ids(tokenizer, example[name]) for name in ("prompt", "completion"))
    limits = {"max_prompt_length": 4, "max_response_length": 3}
    tokens, targets = encode_one(example, tokenizer, **limits)
    assert tokens == prompt[-4:] + completion[:3]
    assert targets == completion[:3]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("1 of 1 prompts lost their left end")
    assert messages[1].startswith("1 of 1 texts lost their right end")
    tokens, _ = encode_one(example, tokenizer, max_length=len(completion) + 3)
    assert tokens == [*prompt[-2:], *completion, tokenizer.eos_token_id]


def test_a_completion_that_fits_exactly_keeps_eos(tokenizer, caplog):
    completion = [*ids(tokenizer, " I loved it."), tokenizer.eos_token_id]
    example = {"prompt": "I saw it.", "completion": " I loved it."}
    _, targets = encode_one(example, tokenizer, max_response_length=len(completion))
    assert targets == completion
    assert not caplog.records


@pytest.mark.parametrize("empty", [{"text": ""}, {"text": "<|endoftext|>"}])
def test_empty_texts_are_dropped_with_one_warning(tokenizer, caplog, empty):
    examples = [{"text": "I loved it."}, empty, empty]
    batch = encode_texts(examples, tokenizer, DataSettings(**UNPACKED))
    assert batch.tokens.shape[0] == 1
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 3 texts were dropped because they are empty."
    ]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("examples", [[], [{"text": ""}], [{"prompt": "p", "completion": ""}]])
def test_nothing_left_is_an_error(tokenizer, examples):
    with pytest.raises(
        InputError, match="No text is left to train on: all [01] examples are empty"
    ):
        encode_texts(examples, tokenizer, DataSettings())


def test_there_is_no_warning_if_nothing_is_changed(tokenizer, caplog):
    encode_texts(builtin.texts(0, 20), tokenizer, DataSettings())
    assert not caplog.records


# --- messages ------------------------------------------------------------------------------------


def test_the_last_turn_of_messages_is_the_target(chat):
    example = {"messages": turns("Hi.", "Hello.", "Was it dull?", "It was.")}
    tokens, targets = encode_one(example, chat)
    eos = chat.eos_token_id
    assert targets == [*ids(chat, "It was."), eos]
    head = "<user>Hi.\n<assistant>Hello.<|endoftext|>\n<user>Was it dull?\n<assistant>"
    assert tokens == [*ids(chat, head), *targets]


def test_all_turns_of_messages_can_be_targets(chat):
    example = {"messages": turns("Hi.", "Hello.")}
    tokens, targets = encode_one(example, chat, completion_only=False)
    assert tokens == [*ids(chat, "<user>Hi.\n<assistant>Hello."), chat.eos_token_id]
    assert targets == tokens[1:]


def test_messages_without_a_template(tokenizer):
    with pytest.raises(InputError, match="tokenizer has no chat template: use a tokenizer with"):
        encode_texts([{"messages": turns("Hi.", "Hello.")}], tokenizer, DataSettings())


def test_messages_that_end_with_the_user(chat):
    examples = [{"messages": turns("Hi.", "Hello.")}, {"messages": turns("Hi.")}]
    with pytest.raises(InputError, match="messages of example 2 end with a turn of 'user'"):
        encode_texts(examples, chat, DataSettings())


def test_a_template_that_cannot_be_split(chat, monkeypatch):
    monkeypatch.setattr(chat, "chat_template", "{{ messages | length }}")
    with pytest.raises(
        InputError, match=r"example 1 differently .* set data.completion_only to false"
    ):
        encode_texts([{"messages": turns("Hi.", "Hello.")}], chat, DataSettings())


# --- packing -------------------------------------------------------------------------------------


def unpacked(batch):
    """The (tokens, targets) of every text of the sequences, by their segments."""
    for tokens, segments, targets in zip(*batch[:3], strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            yield tuple(tokens[here].tolist()), tuple(targets[here].tolist())


@pytest.mark.parametrize("packing", [True, False])
def test_packing_loses_no_token(tokenizer, packing):
    settings = DataSettings(max_length=96, packing=packing)
    examples = builtin.texts(0, 60)
    batch = encode_texts(examples, tokenizer, settings)
    texts = tokenize_texts(examples, tokenizer, settings)
    expected = [(tuple(text.tokens), tuple(text.is_target)) for text in texts]
    assert sorted(unpacked(batch)) == sorted(expected)
    assert len(texts) == 60
    assert sum(len(t.tokens) for t in texts) == (batch.segments > 0).sum()
    assert (len(batch.tokens) < 40) == packing


@pytest.mark.parametrize("packing", [True, False])
def test_target_positions_are_those_of_the_mask(tokenizer, packing):
    examples = [
        {"prompt": "Once upon a time there was " * 4, "completion": " an end." * (1 + i % 3)}
        for i in range(9)
    ]
    settings = DataSettings(max_length=128, completion_only=True, packing=packing)
    batch = encode_texts(examples, tokenizer, settings)
    assert batch.target_positions.shape[1] < 0.75 * batch.tokens.shape[1]
    assert (batch.target_positions > 0).sum() == batch.loss_mask.sum()
    for positions, mask in zip(batch.target_positions, batch.loss_mask, strict=True):
        count = mask.sum()
        assert positions[:count].tolist() == np.nonzero(mask)[0].tolist()
        assert not positions[count:].any()
    # With all tokens but the first of a text as targets, logits are computed everywhere.
    all_tokens = dataclasses.replace(settings, completion_only=False)
    assert encode_texts(examples, tokenizer, all_tokens).target_positions is None


def test_sequences_are_filled_from_the_left_and_padded_on_the_right(tokenizer):
    batch = encode_texts(builtin.texts(0, 50), tokenizer, DataSettings(max_length=90))
    real = batch.segments > 0
    assert batch.tokens.shape[1] <= 90
    assert np.array_equal(real, np.sort(real, axis=1)[:, ::-1])
    assert not batch.tokens[~real].any()
    assert not batch.loss_mask[~real].any()
    steps = np.diff(np.where(real, batch.segments, 0), axis=1)[real[:, 1:]]
    assert set(steps.tolist()) <= {0, 1}
    starts = np.diff(batch.segments, axis=1, prepend=0) == 1
    assert not batch.loss_mask[starts].any()
    assert [batch.tokens.dtype, batch.segments.dtype] == [np.int32, np.int32]
    assert batch.loss_mask.dtype == bool


def test_width_is_a_multiple_of_eight_up_to_the_limit(tokenizer):
    example = {"text": "I loved it."}
    length = len(ids(tokenizer, example["text"])) + 1
    batch = encode_texts([example], tokenizer, DataSettings())
    assert batch.tokens.shape[1] == -(-length // 8) * 8
    batch = encode_texts([example] * 9, tokenizer, DataSettings(max_length=2 * length + 1))
    assert batch.tokens.shape[1] <= 2 * length + 1


def first_fit_by_loop(lengths, capacity):
    sequences = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for sequence in sequences:
            if sum(lengths[i] for i in sequence) + lengths[index] <= capacity:
                sequence.append(index)
                break
        else:
            sequences.append([index])
    return sequences


@given(st.lists(st.integers(1, 20), max_size=60))
def test_pack_is_first_fit_decreasing(lengths):
    assert pack(lengths, 20) == first_fit_by_loop(lengths, 20)
