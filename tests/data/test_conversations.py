"""Conversations split into prompt and response, and prompts that keep their suffix."""

import pytest

from rlhf_jax.data import encode_pairs, encode_prompts, encode_rankings, encode_texts, load_examples
from rlhf_jax.data.encoding import tokenize_prompts
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from tests.data.texts import ids

MARK = "\n\nAssistant:"
HEAD = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Was it dull?\n\nAssistant:"
PAIR = {"chosen": HEAD + " It was.", "rejected": HEAD + " No."}
APART = {"chosen": HEAD + " It was.", "rejected": "\n\nHuman: Hi.\n\nAssistant: No."}
UNMARKED = {"chosen": "It was.", "rejected": "No."}


def load(path, kind, **settings):
    return load_examples(DataSettings(path=path, **{"eval_rows": 0, **settings}), kind)[0]


def test_pairs_are_split_at_the_last_turn(write, caplog):
    path = write("a.jsonl", [PAIR, APART, UNMARKED])
    assert load(path, "pairs", split_at=MARK) == [
        {"prompt": HEAD, "chosen": " It was.", "rejected": " No.", "margin": 0.0}
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 3 pairs of {path} were dropped because they do not have data.split_at "
        r"('\n\nAssistant:') in each of their texts, or differ before it."
    ]
    caplog.clear()
    load_examples(DataSettings(path=path, eval_rows=0, split_at=MARK), "pairs", quiet=True)
    assert not caplog.records


def test_both_parts_of_a_hold_out_are_split(write):
    settings = DataSettings(path=write("a.jsonl", [PAIR] * 4), eval_rows=2, split_at=MARK)
    train, held_out = load_examples(settings, "pairs")
    assert {example["prompt"] for example in train + held_out} == {HEAD}


def test_examples_with_a_prompt_are_not_split(write):
    example = {"prompt": HEAD, "chosen": " One.\n\nAssistant: Two.", "rejected": " Three."}
    path = write("a.jsonl", [example])
    assert load(path, "pairs", split_at=MARK) == [{**example, "margin": 0.0}]
    expected = [{"prompt": HEAD, "completion": example["chosen"]}]
    assert load(path, "text", split_at=MARK) == expected
    assert load(path, "prompts", split_at=MARK) == [example]


def test_rankings_are_split(write, caplog):
    examples = [{"responses": [PAIR["chosen"], PAIR["rejected"]]}, {"responses": ["none"]}]
    assert load(write("a.jsonl", examples), "rankings", split_at=MARK) == [
        {"prompt": HEAD, "responses": [" It was.", " No."], "margin": 0.0}
    ]
    assert len(caplog.records) == 1


def test_the_last_turn_of_comparisons_is_the_target(write, tokenizer, caplog):
    path = write("a.jsonl", [PAIR, UNMARKED])
    examples = load(path, "text", split_at=MARK)
    assert examples == [{"prompt": HEAD, "completion": " It was."}]
    assert "1 of 2 texts of" in caplog.text
    batch = encode_texts(examples, tokenizer, DataSettings())
    assert batch.tokens[0][batch.loss_mask[0]].tolist() == ids(tokenizer, " It was.<|endoftext|>")
    assert load(path, "text")[0] == {"text": PAIR["chosen"]}


def test_prompts_of_comparisons_and_of_texts(write):
    example = {**PAIR, "id": 7}
    expected = {"id": 7, "prompt": HEAD, "chosen": " It was.", "rejected": " No."}
    assert load(write("a.jsonl", [example]), "prompts", split_at=MARK) == [expected]
    example = {"text": PAIR["chosen"], "id": 7}
    expected = {"id": 7, "prompt": HEAD, "completion": " It was."}
    assert load(write("b.jsonl", [example]), "prompts", split_at=MARK) == [expected]


def test_examples_that_cannot_be_split_are_one_sentence(write):
    path = write("a.jsonl", [UNMARKED])
    with pytest.raises(
        InputError, match="No example of .* can be split: none has data.split_at .* all"
    ):
        load(path, "pairs", split_at=MARK)
    with pytest.raises(
        InputError, match="column `chosen` is read for its prompts, but holds texts"
    ):
        load(path, "prompts")
    message = [{"role": "user", "content": "Hi."}]
    path = write("b.jsonl", [{"chosen": message, "rejected": message}])
    with pytest.raises(
        InputError, match="Line 1 of .* holds messages, .*: leave out data.split_at"
    ):
        load(path, "pairs", split_at=MARK)
    for key in ("split_at", "prompt_suffix"):
        with pytest.raises(InputError, match=f"data.{key} is empty: give it a text"):
            DataSettings(**{key: " "})


# --- prompts with a suffix -----------------------------------------------------------------------

POST = "I saw The Golden River. The acting was superb. The plot was dull."
TLDR = {"prompt_suffix": "TL;DR:"}


def test_long_prompts_are_truncated_before_their_suffix(tokenizer, caplog):
    settings = DataSettings(**TLDR, max_prompt_length=20)
    texts = [POST * 3 + "\n\nTL;DR:", "Short.\n\nTL;DR:", POST * 3]
    ending = ids(tokenizer, "\n\nTL;DR:")
    full = ids(tokenizer, POST * 3)
    batch = encode_prompts([{"prompt": text} for text in texts], tokenizer, settings)
    result = [tokens[mask].tolist() for tokens, mask in zip(*batch[:2], strict=True)]
    assert result[0] == full[: 20 - len(ending)] + ending
    assert result[1] == ids(tokenizer, texts[1])
    assert result[2] == full[-20:]
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 3 prompts lost their left end: they exceed data.max_prompt_length (20 tokens).",
        "1 of 3 prompts lost the right end of the text before 'TL;DR:': they exceed "
        "data.max_prompt_length (20 tokens).",
    ]


def test_every_kind_of_examples_is_truncated_alike(tokenizer, caplog):
    settings = DataSettings(**TLDR, max_prompt_length=20)
    prompt = POST * 3 + "\n\nTL;DR:"
    pair = {"prompt": prompt, "chosen": " Good.", "rejected": " Bad."}
    ranking = {"prompt": prompt, "responses": [" Good.", " Bad."]}
    text = {"prompt": prompt, "completion": " Good."}
    expected = encode_prompts([{"prompt": prompt}], tokenizer, settings).prompts[0].tolist()
    for batch in (
        encode_pairs([pair], tokenizer, settings),
        encode_rankings([ranking], tokenizer, settings),
    ):
        assert batch.prompts[0].tolist() == expected
    caplog.clear()
    batch = encode_texts([text], tokenizer, settings)
    assert batch.tokens[0][:20].tolist() == expected
    assert "1 of 1 prompts lost the right end of the text before 'TL;DR:'" in caplog.text
    # With less room than that, the completion keeps its own.
    short = DataSettings(**TLDR, max_prompt_length=20, max_length=20)
    batch = encode_texts([text], tokenizer, short)
    completion = ids(tokenizer, " Good.<|endoftext|>")
    ending = ids(tokenizer, "\n\nTL;DR:")
    assert batch.tokens[0].tolist()[-len(ending + completion) :] == ending + completion


def test_the_suffix_is_complete_or_an_error(tokenizer):
    prompts = tokenize_prompts(tokenizer, ["a TL;DR: ", "b"], DataSettings(**TLDR))
    assert prompts[0].ending == ids(tokenizer, " TL;DR: ")
    assert prompts[1].ending == []
    with pytest.raises(InputError, match=r"data.prompt_suffix 'TL;DR:' has \d+ tokens, more than"):
        tokenize_prompts(tokenizer, ["a TL;DR:"], DataSettings(**TLDR, max_prompt_length=2))


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("post\nTL;DR:", " it"), ("post\nTL;DR: ", "it"), ("post", "TL;DR: it")],
    ids=["apart", "space", "responses"],
)
def test_the_position_of_the_suffix_makes_no_difference(write, prompt, response):
    """The hub's two data sets of TL;DR have it at the end of prompts, and before the responses."""
    expected = {"prompt": "post\nTL;DR:", "chosen": " it", "rejected": " it too", "margin": 0.0}
    example = {"prompt": prompt, "chosen": response, "rejected": response + " too"}
    assert load(write("a.jsonl", [example]), "pairs", **TLDR) == [expected]
    example = {"prompt": prompt, "label": response}
    columns = {"completion": "label"}
    expected = [{"prompt": "post\nTL;DR:", "completion": " it"}]
    assert load(write("b.jsonl", [example]), "text", **TLDR, columns=columns) == expected
    example = {"prompt": prompt, "responses": [response]}
    result = load(write("c.jsonl", [example]), "rankings", **TLDR)
    assert result == [{"prompt": "post\nTL;DR:", "responses": [" it"], "margin": 0.0}]


# --- short responses -----------------------------------------------------------------------------


def test_pairs_with_a_short_response_are_dropped(tokenizer, caplog):
    settings = DataSettings(min_response_words=3)
    example = {"prompt": "p", "chosen": " It was fun.", "rejected": " It was dull."}
    short = {**example, "rejected": " Quite dull."}
    batch = encode_pairs([example, short, {**example, "chosen": " Fun."}], tokenizer, settings)
    assert len(batch.valid) == 1
    message = "2 of 3 pairs were dropped because they have a response of fewer than 3 words."
    assert [record.getMessage() for record in caplog.records] == [message]
    with pytest.raises(InputError, match="No pair is left: .*, 1 a response of fewer than 3 words"):
        encode_pairs([short], tokenizer, settings)


def test_short_responses_leave_a_ranking(tokenizer, caplog):
    example = {"prompt": "p", "responses": [" It was fun.", " Fun.", " It was dull."]}
    batch = encode_rankings([example], tokenizer, DataSettings(min_response_words=3))
    assert batch.mask.any(axis=2).tolist() == [[True, True]]
    assert "1 of 3 ranked responses were dropped because they have fewer than 3" in caplog.text
