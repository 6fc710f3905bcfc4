"""Prompts as examples: padding, truncation, empty ones, and beginnings of texts."""

import numpy as np
import pytest

from rlhf_jax.data import builtin, encode_prompts
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from tests.data.texts import ids


def real(batch, row=0):
    return batch.prompts[row][batch.prompt_mask[row]].tolist()


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_prompts_are_left_padded(tokenizer, caplog, column):
    examples = [{column: example["prompt"], "label": 1} for example in builtin.prompts(0, 30)]
    batch = encode_prompts(examples, tokenizer, DataSettings())
    assert [real(batch, i) for i in range(30)] == [
        ids(tokenizer, each[column]) for each in examples
    ]
    assert np.array_equal(batch.prompt_mask, np.sort(batch.prompt_mask, axis=1))
    assert not batch.prompts[~batch.prompt_mask].any()
    assert batch.prompts.shape[1] % 8 == 0
    assert batch.indices.tolist() == list(range(30))
    assert [array.dtype for array in batch[:3]] == [np.int32, bool, np.int32]
    assert batch.texts is None
    assert not caplog.records


def test_long_prompts_lose_their_left_end(tokenizer, caplog):
    examples = [{"prompt": "I saw The Golden River."}, {"prompt": "I"}]
    batch = encode_prompts(examples, tokenizer, DataSettings(max_prompt_length=5))
    assert batch.prompts.shape[1] == 5
    assert real(batch) == ids(tokenizer, examples[0]["prompt"])[-5:]
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("1 of 2 prompts lost their left end")


def test_an_empty_prompt_becomes_one_token(tokenizer, caplog):
    batch = encode_prompts([{"prompt": ""}, {"prompt": "I"}], tokenizer, DataSettings())
    assert real(batch) == [tokenizer.bos_token_id]
    assert "1 of 2 prompts are empty" in caplog.text


def test_without_bos_an_empty_prompt_becomes_eos(tokenizer):
    import transformers

    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token
    )
    assert other.bos_token_id is None
    assert real(encode_prompts([{"prompt": ""}], other, DataSettings())) == [tokenizer.eos_token_id]


def test_beginnings_depend_only_on_seed_and_index(tokenizer, caplog):
    examples = [{"text": example["prompt"]} for example in builtin.prompts(0, 200)]
    settings = DataSettings(prompt_tokens=(2, 5), seed=4)
    batch = encode_prompts(examples, tokenizer, settings)
    lengths = batch.prompt_mask.sum(1)
    assert set(lengths.tolist()) == {2, 3, 4, 5}
    assert np.bincount(lengths)[2:].min() > 25
    for row in (0, 7, 199):
        assert real(batch, row) == ids(tokenizer, examples[row]["text"])[: lengths[row]]
    fewer = encode_prompts(examples[:50], tokenizer, settings)
    np.testing.assert_array_equal(fewer.prompt_mask.sum(1), lengths[:50])
    other = encode_prompts(examples, tokenizer, DataSettings(prompt_tokens=(2, 5), seed=5))
    assert (other.prompt_mask.sum(1) != lengths).any()
    assert not caplog.records


def test_beginnings_are_for_texts_only_and_short_texts_are_unchanged(tokenizer):
    settings = DataSettings(prompt_tokens=(2, 2))
    batch = encode_prompts([{"prompt": "I saw it."}, {"prompt": "We"}], tokenizer, settings)
    assert real(batch) == ids(tokenizer, "I saw it.")
    batch = encode_prompts([{"text": "I"}], tokenizer, settings)
    assert real(batch) == ids(tokenizer, "I")


def test_no_prompts_are_an_error(tokenizer):
    with pytest.raises(InputError, match="There are no prompts"):
        encode_prompts([], tokenizer, DataSettings())
