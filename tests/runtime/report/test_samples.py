"""Samples in the report: beside the first ones, with labels, and token by token."""

import json

import pytest

from rlhf_jax.runtime.report import samples
from tests.runtime.report.pages import read, write_lines


def test_logged_samples_stand_beside_the_first_for_the_same_prompt():
    entries = [
        {"step": 0, "prompt": "p", "response": "old", "score": 0.0},
        {"step": 5, "prompt": "p", "response": "middle", "score": 1.0},
        {"step": 9, "prompt": "p", "response": "new", "score": 2.0, "reference": "human"},
        {"step": 9, "prompt": "q", "response": "other", "score": "NaN"},
    ]
    (first, second), title = samples.logged_samples(entries)
    assert title == "Samples of step 9"
    headings = [(side.heading, side.text, side.latest) for side in first.sides]
    assert headings == [
        ("Step 0", "old", False),
        ("Step 9", "new", True),
        ("reference", "human", False),
    ]
    assert first.sides[1].numbers == (("score", "2.00", "up", ""),)
    assert json.loads(first.keys) == {"score": 2.0, "length": 3}
    assert [side.text for side in second.sides] == ["other"]
    assert second.sides[0].numbers == (("score", "nan", "", ""),)
    assert json.loads(second.keys) == {"length": 5}


def test_responses_with_labels_are_one_sample_and_the_label_is_no_text():
    """Unchanged responses that are scored again stand once, with their earlier score."""
    scores = {("chosen", 0): 0.25, ("rejected", 0): 0.5, ("chosen", 9): 1.5, ("rejected", 9): -1}
    entries = [
        {"step": step, "prompt": "p", "response": f"the {label}", "label": label, "score": score}
        for (label, step), score in scores.items()
    ]
    twice = [*entries[:2], *entries[:2], *entries[2:], *entries[2:]]  # two pairs of one prompt
    shown, _ = samples.logged_samples(twice)
    assert len(shown) == 2
    for sample in shown:
        assert [(side.heading, side.text) for side in sample.sides] == [
            ("chosen", "the chosen"),
            ("rejected", "the rejected"),
        ]
        assert [side.numbers for side in sample.sides] == [
            (("score", "1.50", "up", "0.25"),),
            (("score", "-1.00", "down", "0.50"),),
        ]
        assert json.loads(sample.keys)["margin"] == 2.5


def test_several_responses_to_a_prompt_stand_beside_their_own_first_ones():
    places = ("place 1", "place 2")
    entries = [
        {"step": step, "prompt": "p", "response": f"{place} at {step}", "label": place}
        for step in (0, 9)
        for place in places
    ]
    ((_, sides, _),), _ = samples.logged_samples(entries)
    assert [(side.heading, side.text) for side in sides] == [
        (f"{place}, step {step}", f"{place} at {step}") for place in places for step in (0, 9)
    ]


def test_tokens_are_on_the_page_with_their_numbers(tmp_path):
    tokens = {
        "text": [" a", "<b>", "c"],
        "kl": [0.5, -0.25, 1],
        "value": [1, 2, "NaN"],  # not one finite number a token
        "advantage": [0.0, 1.0, -1.0],
    }
    entry = {"step": 3, "prompt": "p", "response": " a<b>c", "kl": 1.25, "tokens": tokens}
    write_lines(tmp_path / "samples.jsonl", [entry])
    page = read(tmp_path)
    (measures,) = (a["data-measures"] for _, a in page.tags if "data-measures" in a)
    assert json.loads(measures) == {"KL": [0.5, -0.25, 1], "advantage": [0.0, 1.0, -1.0]}
    assert (
        "<span> a</span><span>&lt;b&gt;</span><span>c</span>"
        in (tmp_path / "report.html").read_text()
    )
    (keys,) = (a["data-keys"] for _, a in page.tags if "data-keys" in a)
    assert json.loads(keys) == {"KL": 1.25, "length": 6}


@pytest.mark.parametrize("tokens", [3, {}, {"text": 3}, {"text": ["a"], "kl": [1, 2]}])
def test_invalid_tokens_are_left_out(tmp_path, tokens):
    entry = {"step": 1, "prompt": "p", "response": "a", "tokens": tokens}
    write_lines(tmp_path / "samples.jsonl", [entry])
    assert "KL" not in [a.get("data-measures") for _, a in read(tmp_path).tags]
