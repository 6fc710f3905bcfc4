"""Score functions in Python: which results they may return, and how they are called."""

import jax
import numpy as np
import pytest

from rlhf_jax.runtime.rewards.functions import call_scores, check_call
from tests.runtime.messages import message


def constant(result):
    def judge(prompts, completions, **columns):
        return result

    return judge


@pytest.mark.parametrize(
    "result", [[1, 0.5], (True, False), np.ones(2), jax.numpy.ones(2), iter([1.0, 2.0])]
)
def test_numbers_of_any_kind_are_scores(result):
    scores = call_scores(constant(result), ["p"] * 2, ["a", "b"], {})
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (None, "judge gave None; it has to give a list of numbers, one for each completion."),
        (0.5, "judge gave 0.5; it has to give a list of numbers, one for each completion."),
        ("12", "judge gave 12; it has to give a list of numbers, one for each completion."),
        ({}, "judge gave {}; it has to give a list of numbers, one for each completion."),
        ([1.0], "judge gave 1 scores for 2 completions; it has to give one for each."),
        ([1.0, "2.0"], "judge gave '2.0' at index 1; it has to give a number for each completion."),
        ([None, 1.0], "judge gave None at index 0; it has to give a number for each completion."),
        ([1.0, [2.0]], "judge gave [2.0] at index 1; it has to give a number for each completion."),
        (
            [1.0, float("nan")],
            "judge gave the score nan for the completion 'b' at index 1; it has to give a finite "
            "number.",
        ),
    ],
)
def test_results_that_are_no_list_of_numbers(result, expected):
    assert message(call_scores, constant(result), ["p"] * 2, ["a", "b"], {}) == expected


@pytest.mark.parametrize(
    ("function", "columns", "expected"),
    [
        (lambda prompts, completions: [], ["label"], "got an unexpected keyword argument 'label'"),
        (lambda prompts, completions, **columns: [], ["prompts"], "multiple values for argument"),
        (lambda prompts: [], [], "too many positional arguments"),
    ],
)
def test_a_function_that_cannot_be_called_with_the_data_is_refused(function, columns, expected):
    error = message(check_call, function, columns)
    assert expected in error
    assert error.endswith("let it take **columns, and call no column prompts or completions.")
    check_call(lambda p, c, **columns: [], ["label", "completion"])
    check_call(max, ["label"])  # its signature is unknown
