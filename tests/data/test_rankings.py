"""Rankings as examples: K responses to a prompt, what is dropped, and batches of them."""

import numpy as np
import pytest

from rlhf_jax.data import Batches, encode_pairs, encode_rankings, eval_batches, load_examples
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from tests.data.texts import ids

GOOD = {"prompt": "I saw it.", "responses": [" I loved it.", " It was dull.", " Bad!"]}


def said(caplog):
    return [record.getMessage() for record in caplog.records]


def load(path, kind="rankings"):
    return load_examples(DataSettings(path=path, eval_rows=0), kind)[0]


def test_a_ranking_keeps_its_order_and_its_places(tokenizer, caplog):
    two = {"prompt": "And she saw The Golden River.", "responses": [" Superb.", " I loved it."]}
    batch = encode_rankings([GOOD, two], tokenizer, DataSettings())
    assert batch.responses.shape[:2] == batch.mask.shape[:2] == (2, 3)
    assert batch.responses.shape[2] % 8 == batch.prompts.shape[1] % 8 == 0
    assert [array.dtype for array in batch] == [np.int32, bool] * 2
    for row, ranking in enumerate((GOOD, two)):
        mask = batch.prompt_mask[row]
        assert batch.prompts[row][mask].tolist() == ids(tokenizer, ranking["prompt"])
        assert np.array_equal(mask, np.sort(mask))
        for place, text in enumerate(ranking["responses"]):
            real = batch.mask[row, place]
            assert batch.responses[row, place][real].tolist() == [
                *ids(tokenizer, text),
                tokenizer.eos_token_id,
            ]
            assert np.array_equal(real, np.sort(real)[::-1])
    assert not batch.mask[1, 2].any()
    assert not batch.responses[~batch.mask].any()
    assert not said(caplog)


def test_a_ranking_without_two_different_responses_is_dropped_with_one_warning(tokenizer, caplog):
    examples = [
        GOOD,
        {"prompt": "p", "responses": ["only one"]},
        {"prompt": "p", "responses": ["same", "same", "same"]},
        {"prompt": "p", "responses": ["", "one and nothing"]},
        {"prompt": "p", "responses": []},
    ]
    batch = encode_rankings(examples, tokenizer, DataSettings())
    assert batch.mask.shape[:2] == (1, 3)
    assert said(caplog) == [
        "4 of 5 rankings were dropped because they have no two responses that differ."
    ]


def test_empty_and_repeated_responses_leave_a_ranking(tokenizer, caplog):
    example = {"prompt": "p", "responses": [" good", "", " fair", " good", " bad"]}
    batch = encode_rankings([example], tokenizer, DataSettings())
    expected = encode_rankings(
        [{**example, "responses": [" good", " fair", " bad"]}], tokenizer, DataSettings()
    )
    for one, other in zip(batch, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert said(caplog) == [
        "1 of 5 ranked responses were dropped because they are empty.",
        "1 of 5 ranked responses were dropped because they equal a better one.",
    ]


def test_truncation_is_counted_and_can_make_responses_equal(tokenizer, caplog):
    example = {
        "prompt": "I saw it.",
        "responses": [" I loved it and more.", " I loved it and less."],
    }
    settings = DataSettings(max_prompt_length=3, max_response_length=4)
    with pytest.raises(InputError, match=r"No ranking is left: of 1, none has two responses that"):
        encode_rankings([example], tokenizer, settings)
    example = {**example, "responses": [*example["responses"], " Bad!"]}
    batch = encode_rankings([example], tokenizer, settings)
    assert batch.mask.shape == (1, 2, 4)
    assert batch.prompts[0].tolist() == ids(tokenizer, "I saw it.")[-3:]
    assert batch.responses[0, 0].tolist() == ids(tokenizer, example["responses"][0])[:4]
    texts = said(caplog)
    assert len(texts) == 3
    assert texts[0].startswith("1 of 3 ranked responses were dropped because they equal")
    assert texts[1].startswith("1 of 1 prompts lost their left end")
    assert "responses lost their right end" in texts[2]


def test_nothing_left_is_an_error(tokenizer):
    for examples in ([], [{"prompt": "p", "responses": ["a"]}]):
        with pytest.raises(
            InputError, match=rf"^No ranking is left: of {len(examples)}, none has two"
        ):
            encode_rankings(examples, tokenizer, DataSettings())


def test_rankings_are_read_from_responses_and_from_pairs(write):
    ranking = {"prompt": "p", "responses": ["a", "b", "c"], "id": 7}
    expected = {"prompt": "p", "responses": ["a", "b", "c"], "margin": 0.0}
    assert load(write("a.jsonl", [ranking])) == [expected]
    single = {"prompt": "p", "responses": ["a"]}
    assert load(write("b.jsonl", [ranking, single]))[1]["responses"] == ["a"]
    with pytest.raises(InputError, match="Line 2 of .*'responses' is no list of two or more"):
        load(write("b.jsonl", [ranking, single]), "pairs")
    pair = {"chosen": "a", "rejected": "b", "margin": 2}
    assert load(write("c.jsonl", [pair])) == [
        {"prompt": "", "responses": ["a", "b"], "margin": 2.0}
    ]
    for responses, what in (("text", "is no list"), (["a", None], "holds nothing")):
        with pytest.raises(InputError, match=f"Line 1 of .*'responses' {what}"):
            load(write("d.jsonl", [{"responses": responses}]))


def test_the_corpus_has_rankings_of_two(tokenizer):
    settings = DataSettings(builtin_rows=6, eval_rows=2)
    (train, held_out), (pairs, _) = (
        load_examples(settings, kind) for kind in ("rankings", "pairs")
    )
    assert (len(train), len(held_out)) == (6, 2)
    rankings, encoded = (
        encode_rankings(train, tokenizer, settings),
        encode_pairs(pairs, tokenizer, settings),
    )
    np.testing.assert_array_equal(rankings.responses[:, 0], encoded.chosen)
    np.testing.assert_array_equal(rankings.mask[:, 1], encoded.rejected_mask)


def test_batches_trim_padding_that_no_ranking_needs(tokenizer):
    long = {"prompt": "I saw it.", "responses": [" fine" * 30, " bad" * 30, " so", " no"]}
    encoded = encode_rankings([GOOD, GOOD, GOOD, long], tokenizer, DataSettings())
    batches = Batches(encoded, 1, seed=0, buckets=2)
    widths = set()
    for step in range(4):
        batch, (index,) = batches.at(step), batches.indices(step)
        widths.add((batch.prompts.shape[1], batch.responses.shape[2]))
        assert batch.mask.shape[1] == 4
        assert batch.mask.sum() == encoded.mask[index].sum()
        assert batch.prompt_mask.sum() == encoded.prompt_mask[index].sum()
        real = batch.responses[batch.mask], encoded.responses[index][encoded.mask[index]]
        np.testing.assert_array_equal(*real)
    assert len(widths) == 2


def test_an_evaluation_is_padded_with_examples_without_responses(tokenizer):
    encoded = encode_rankings([GOOD] * 3, tokenizer, DataSettings())
    first, second = eval_batches(encoded, 2)
    assert first.mask.any(axis=(1, 2)).all()
    assert second.mask.any(axis=(1, 2)).tolist() == [True, False]
