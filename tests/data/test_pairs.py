"""Preference pairs as examples: padding, EOS, truncation, and dropped pairs."""

import numpy as np
import pytest

from rlhf_jax.data import builtin, encode_pairs
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from tests.data.texts import ids

EXAMPLE = {
    "prompt": "I saw The Golden River.",
    "chosen": " I loved it.",
    "rejected": " It was dull.",
}


def real(tokens, mask, row=0):
    return tokens[row][mask[row]].tolist()


def test_the_parts_of_a_pair(tokenizer, caplog):
    eos = tokenizer.eos_token_id
    examples = [EXAMPLE, {**EXAMPLE, "prompt": "I saw it.", "margin": 1.5}]
    batch = encode_pairs(examples, tokenizer, DataSettings())
    assert real(batch.prompts, batch.prompt_mask) == ids(tokenizer, EXAMPLE["prompt"])
    assert real(batch.chosen, batch.chosen_mask) == [*ids(tokenizer, EXAMPLE["chosen"]), eos]
    assert real(batch.rejected, batch.rejected_mask) == [*ids(tokenizer, EXAMPLE["rejected"]), eos]
    assert batch.margin.tolist() == [0.0, 1.5]
    assert batch.valid.tolist() == [True, True]
    assert not caplog.records


def test_sides_widths_and_types(tokenizer):
    batch = encode_pairs(builtin.pairs(0, 40), tokenizer, DataSettings())
    assert np.array_equal(batch.prompt_mask, np.sort(batch.prompt_mask, axis=1))
    for tokens, mask in ((batch.chosen, batch.chosen_mask), (batch.rejected, batch.rejected_mask)):
        assert np.array_equal(mask, np.sort(mask, axis=1)[:, ::-1])
        assert not tokens[~mask].any()
        last = mask.sum(1) - 1
        assert (tokens[np.arange(40), last] == tokenizer.eos_token_id).all()
        assert ((tokens == tokenizer.eos_token_id) & mask).sum() == 40
    assert not batch.prompts[~batch.prompt_mask].any()
    assert batch.chosen.shape == batch.rejected.shape
    assert batch.prompts.shape[1] % 8 == batch.chosen.shape[1] % 8 == 0
    longest = max(batch.chosen_mask.sum(1).max(), batch.rejected_mask.sum(1).max())
    assert batch.chosen.shape[1] - longest < 8
    assert [array.dtype for array in batch[:8]] == [np.int32, bool] * 3 + [np.float32, bool]


def test_eos_is_not_repeated(tokenizer):
    written = {**EXAMPLE, "chosen": EXAMPLE["chosen"] + "<|endoftext|>"}
    plain, same = (encode_pairs([each], tokenizer, DataSettings()) for each in (EXAMPLE, written))
    for one, other in zip(plain, same, strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_prompts_their_width_is_zero(tokenizer):
    batch = encode_pairs([{"chosen": "a", "rejected": "b"}], tokenizer, DataSettings())
    assert batch.prompts.shape == batch.prompt_mask.shape == (1, 0)


def test_prompts_lose_their_left_and_responses_their_right_end(tokenizer, caplog):
    settings = DataSettings(max_prompt_length=3, max_response_length=5)
    example = {**EXAMPLE, "chosen": " The acting was really superb.", "rejected": " I"}
    examples = [example, {**example, "prompt": "I"}]
    batch = encode_pairs(examples, tokenizer, settings)
    assert batch.prompts.shape[1] == 3
    assert batch.chosen.shape[1] == 5
    assert real(batch.prompts, batch.prompt_mask) == ids(tokenizer, EXAMPLE["prompt"])[-3:]
    assert real(batch.chosen, batch.chosen_mask) == ids(tokenizer, example["chosen"])[:5]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("1 of 2 prompts lost their left end")
    assert messages[1].startswith("2 of 4 responses lost their right end")


def test_empty_and_equal_responses_are_dropped(tokenizer, caplog):
    examples = [
        EXAMPLE,
        {**EXAMPLE, "chosen": ""},
        {**EXAMPLE, "rejected": "<|endoftext|>"},
        {**EXAMPLE, "rejected": EXAMPLE["chosen"]},
    ]
    batch = encode_pairs(examples, tokenizer, DataSettings())
    assert len(batch.valid) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 pairs were dropped because a response is empty.",
        "1 of 4 pairs were dropped because their two responses are equal.",
    ]


def test_responses_that_are_equal_after_truncation_are_dropped(tokenizer):
    example = {**EXAMPLE, "chosen": " I loved it and more.", "rejected": " I loved it and less."}
    batch = encode_pairs([example, EXAMPLE], tokenizer, DataSettings(max_response_length=4))
    assert len(batch.valid) == 1


@pytest.mark.parametrize(
    "examples", [[], [{**EXAMPLE, "chosen": ""}, {**EXAMPLE, "chosen": EXAMPLE["rejected"]}]]
)
def test_nothing_left_is_an_error(tokenizer, examples):
    with pytest.raises(InputError, match=r"No pair is left: of [02], [01] have an empty response"):
        encode_pairs(examples, tokenizer, DataSettings())
