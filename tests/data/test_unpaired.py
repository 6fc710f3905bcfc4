"""Responses with a label: formats, tokens, and the responses to other prompts."""

import numpy as np
import pytest

from rlhf_jax.data import DataSettings, load_examples
from rlhf_jax.data.kinds import encode_examples
from rlhf_jax.errors import InputError

LINES = [
    '{"prompt": "a", "completion": " one", "label": true}',
    '{"prompt": "a", "completion": " two", "label": false}',
    '{"prompt": "b", "completion": " three", "label": true}',
    '{"prompt": "c", "completion": " four", "label": false}',
]


def load(tmp_path, lines, name="data.jsonl"):
    file = tmp_path / name
    file.write_text("\n".join(lines) + "\n")
    return load_examples(DataSettings(path=str(file), eval_rows=0), "unpaired")[0]


def test_labels_and_tokens(tmp_path, tokenizer):
    examples = load(tmp_path, LINES)
    batch = encode_examples("unpaired", examples, tokenizer, DataSettings())
    assert batch.labels.tolist() == [True, False, True, False]
    for row, text in enumerate((" one", " two", " three", " four")):
        tokens = batch.responses[row][batch.mask[row]].tolist()
        assert tokens == [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert batch.valid.all()


def test_the_other_response_is_one_to_the_previous_prompt(tmp_path, tokenizer):
    """The first two share a prompt: for both it is that of the last example."""
    batch = encode_examples("unpaired", load(tmp_path, LINES), tokenizer, DataSettings())
    for row, source in enumerate((3, 3, 0, 2)):
        np.testing.assert_array_equal(batch.other[row], batch.responses[source])
        np.testing.assert_array_equal(batch.other_mask[row], batch.mask[source])


def test_the_other_responses_of_pairs_have_both_labels(tmp_path, tokenizer):
    """Also where the first and the last example share a prompt."""
    lines = [f'{{"prompt": "{p}", "chosen": "x {p}", "rejected": "y {p}"}}' for p in "abcd"]
    examples = load(tmp_path, lines)
    batch = encode_examples("unpaired", examples, tokenizer, DataSettings())
    for row, source in enumerate((6, 7, 0, 1, 2, 3, 4, 5)):
        np.testing.assert_array_equal(batch.other[row], batch.responses[source])
    batch = encode_examples("unpaired", examples[1:] + examples[:1], tokenizer, DataSettings())
    for row, source in enumerate((6, 7, 0, 1, 2, 3, 4, 5)):
        circle = [batch.responses[(n - 1) % 8] for n in range(8)]
        np.testing.assert_array_equal(batch.other[(row - 1) % 8], circle[source])


def test_where_all_prompts_are_equal_it_is_the_example_before(tmp_path, tokenizer):
    lines = [line.replace('"b"', '"a"').replace('"c"', '"a"') for line in LINES]
    batch = encode_examples("unpaired", load(tmp_path, lines), tokenizer, DataSettings())
    np.testing.assert_array_equal(batch.other, np.roll(batch.responses, 1, axis=0))


def test_pairs_make_two_examples(tmp_path):
    examples = load(tmp_path, ['{"prompt": "a", "chosen": "b", "rejected": "c"}'])
    assert [(e["prompt"], e["completion"], e["label"]) for e in examples] == [
        ("a", "b", True),
        ("a", "c", False),
    ]


def test_conversations_of_pairs_are_split(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"chosen": "Q: hi A: good", "rejected": "Q: hi A: bad"}\n')
    settings = DataSettings(path=str(file), eval_rows=0, split_at=" A:")
    examples, _ = load_examples(settings, "unpaired")
    assert [(e["prompt"], e["completion"], e["label"]) for e in examples] == [
        ("Q: hi A:", " good", True),
        ("Q: hi A:", " bad", False),
    ]


def test_labels_of_a_csv_file_are_texts(tmp_path):
    lines = ["prompt,completion,label", "a,b,true", "a,c,False"]
    examples = load(tmp_path, lines, "data.csv")
    assert [example["label"] for example in examples] == [True, False]


@pytest.mark.parametrize(("label", "shown"), [("1", "1"), ('"yes"', "'yes'"), ("null", "None")])
def test_labels_that_are_not_booleans_are_refused(tmp_path, label, shown):
    lines = [*LINES[:1], f'{{"prompt": "a", "completion": "b", "label": {label}}}']
    with pytest.raises(InputError, match="^Line 2 of .*data.jsonl: ") as error:
        load(tmp_path, lines)
    assert str(error.value).endswith(f"column 'label' holds {shown}, neither true nor false.")


def test_empty_responses_are_dropped_and_counted(tmp_path, tokenizer, caplog):
    lines = [*LINES, '{"prompt": "d", "completion": "", "label": true}']
    batch = encode_examples("unpaired", load(tmp_path, lines), tokenizer, DataSettings())
    assert len(batch.labels) == 4
    assert "1 of 5 responses were dropped because they are empty." in caplog.text


def test_no_response_left_is_an_error(tmp_path, tokenizer):
    examples = load(tmp_path, [LINES[0].replace(" one", "")])
    with pytest.raises(InputError, match="^No response is left: all 1 are empty or too short.$"):
        encode_examples("unpaired", examples, tokenizer, DataSettings())
