"""The rewards of rlhf_jax.rewards, and that each can be called as the commands call it."""

import importlib
import inspect
import sys

import pytest

from rlhf_jax import rewards
from rlhf_jax.runtime.rewards.functions import check_call, load_function
from tests.runtime.messages import message

NUMBERS = [
    ("The sum is 42", 42, 1.0),
    ("3-5", 5, 1.0),  # no sign: a number stands before it
    ("x = -5.", -5, 1.0),
    ("1,234,567 people", "1234567", 1.0),
    ("1,2,3", 3, 1.0),
    ("0.50", "so #### 1/2 is .5", 1.0),
    ("It is 4 or 5", 4, 0.0),
    ("none", 4, 0.0),
    ("9007199254740993", 9007199254740992, 0.0),  # equal as floats
]


@pytest.mark.parametrize(("text", "answer", "score"), NUMBERS)
def test_the_last_number_counts(text, answer, score):
    turns = [{"role": "user", "content": "7"}, {"role": "assistant", "content": text}]
    for completion in (text, turns):
        assert rewards.numeric_match([""], [completion], answer=[answer]) == [score]


def test_tolerance_and_case():
    assert rewards.numeric_match([""], ["3.14"], answer=[3.1416], tolerance=0.002) == [1.0]
    assert rewards.exact_match([""], ["\n PARIS"], answer=["Paris "]) == [0.0]
    assert rewards.exact_match([""], ["\n PARIS"], answer=["Paris "], ignore_case=True) == [1.0]


def test_repeated_words_by_a_loop():
    text = "the cat and the cat and a dog and the cat"
    words, seen, repeated = text.split(), [], 0
    for start in range(len(words) - 1):
        repeated += words[start : start + 2] in seen
        seen.append(words[start : start + 2])
    (score,) = rewards.repetition_penalty([""], [text.upper()], size=2, max_penalty=-0.5)
    assert score == pytest.approx(-0.5 * repeated / len(seen))
    assert rewards.repetition_penalty(["", ""], ["", "one"], size=2) == [0.0, 0.0]


def test_lengths():
    ids = [[1] * 6, [1] * 2]
    arguments = {"completion_ids": ids, "target": 4, "coefficient": 0.1}
    both = rewards.length_penalty([""] * 2, ["", ""], **arguments)
    assert both == pytest.approx([-0.2, -0.2])
    longer = rewards.length_penalty([""] * 2, ["", ""], **arguments, only_longer=True)
    assert longer == pytest.approx([-0.2, 0.0])


def test_each_is_a_reward_by_name_and_wrong_arguments_are_one_sentence():
    for name in {*rewards.__all__} - {"math_match"}:
        function = load_function(f"rlhf_jax.rewards:{name}")
        needed = inspect.signature(function).parameters
        check_call(function, {"answer", "target", "completion_ids"} & {*needed} | {"other"})
    assert "has no number" in message(rewards.numeric_match, [""], ["1"], answer=["Paris"])
    assert "is no regular expression" in message(rewards.format_match, [""], [""], pattern="(")
    assert "size must be at least 1" in message(rewards.repetition_penalty, [""], [""], size=0)
    assert "target must be at least 1" in message(
        rewards.length_penalty, [""], [""], completion_ids=[[]], target=0
    )


def test_a_package_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "rlhf_jax.rewards.expressions", raising=False)
    error = message(load_function, "rlhf_jax.rewards:math_match")
    assert error.endswith(
        "needs the package math-verify, which is not installed: pip install math-verify."
    )
    assert "\n" not in error


def test_expressions_are_compared_by_value():
    pytest.importorskip("math_verify")
    expressions = importlib.import_module("rlhf_jax.rewards.expressions")
    texts = [r"so $\frac{2}{4}$", "0.5", "1/3"]
    answers = [r"\frac{1}{2}", "1/2", r"\frac{1}{2}"]
    assert expressions.math_match([""] * 3, texts, answer=answers) == [1.0, 1.0, 0.0]
