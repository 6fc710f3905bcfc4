"""Score functions in Python: which results they may return, and how they are called."""

import itertools
import json
import os
import sys
import time

import jax
import numpy as np
import pytest

from rlhf_jax.data import DataSettings, load_examples
from rlhf_jax.runtime.commands import terminal
from rlhf_jax.runtime.evaluation.policies import columns_of
from rlhf_jax.runtime.rewards import functions
from rlhf_jax.runtime.rewards.functions import call_scores, check_call, load_function
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
        ("12", "judge gave '12'; it has to give a list of numbers, one for each completion."),
        ({}, "judge gave {}; it has to give a list of numbers, one for each completion."),
        ({1.0, 2.0}, "judge gave {1.0, 2.0}; it has to give a list of numbers, one for each compl"),
        (
            itertools.repeat(1.0),
            "judge gave more than 2 scores for 2 completions; it has to give a",
        ),
        ([1.0, 10**400], f"judge gave the score 1{'0' * 99}... for the completion 'b' at index 1"),
        ([10**5000] * 2, "judge gave the score a int that is too large to show for the completion"),
        ([1.0], "judge gave 1 scores for 2 completions; it has to give a list"),
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
    error = message(call_scores, constant(result), ["p"] * 2, ["a", "b"], {})
    assert error.startswith(expected)


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


def test_a_function_cannot_change_the_texts_that_it_scores():
    def clears(prompts, completions, *, label):
        scores = [len(text) for text in completions]
        for values in (prompts, completions, label):
            values.clear()
        return scores

    texts, columns = ["a", "bc"], {"label": [0, 1]}
    assert call_scores(clears, texts, texts, columns) == [1.0, 2.0]
    assert (texts, columns) == (["a", "bc"], {"label": [0, 1]})


def test_a_function_that_ends_the_program_is_an_error():
    def leaves(prompts, completions):
        sys.exit(0)

    expected = "leaves ends the program by sys.exit(0)."
    assert message(call_scores, leaves, ["p"], ["a"], {}) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "../../etc/passwd:x",
            "'../../etc/passwd:x' names no function; write it as module:function",
        ),
        (".scores:f", "'.scores:f' names no function; write it as module:function, not as a path."),
        ("scores", "'scores' names no function; write it as module:function, not as a path."),
        ("no_such.scores:f", "'no_such.scores:f' names no function (No module named 'no_such')"),
        (
            "broken:f",
            "The module of 'broken:f' cannot be imported (SyntaxError: '(' was never clos",
        ),
        ("failing:f", "The module of 'failing:f' cannot be imported (ZeroDivisionError: division "),
        ("leaving:f", "The module of 'leaving:f' cannot be imported (SystemExit: 0, "),
    ],
)
def test_names_of_no_function_are_one_sentence(tmp_path, monkeypatch, name, expected):
    for module, text in (("broken", "f("), ("failing", "1 / 0"), ("leaving", "exit(0)")):
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    error = message(load_function, name)
    assert error.startswith(expected)
    assert "\n" not in error


def test_functions_receive_the_columns_of_the_data_alone(tmp_path):
    """As they are in the file, also where the prompt is a part of one."""
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    for columns in (
        {"text": "Q: a A: b", "id": 7},
        {"chosen": "Q: a A: b", "rejected": "Q: a A: c", "id": 7},
        {"prompt": "Q: a A:", "id": 7},
    ):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(columns) + "\n")
        settings = DataSettings(path=str(path), eval_rows=0, split_at="A:", prompt_suffix="A:")
        examples = load_examples(settings, "prompts")[0]
        assert examples[0]["prompt"] == "Q: a A:"
        expected = {name: [value] for name, value in columns.items() if name != "prompt"}
        assert columns_of(examples, [0]) == expected
    path.write_text(json.dumps({"messages": turns, "id": 7}) + "\n")
    examples = load_examples(DataSettings(path=str(path), eval_rows=0), "prompts")[0]
    assert columns_of(examples, [0]) == {"messages": [turns], "id": [7]}


def test_a_call_that_takes_long_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(functions, "PATIENCE", 0.01)

    def slow(prompts, completions):
        time.sleep(0.2)
        return [1.0]

    assert call_scores(slow, ["p"], ["a"], {}) == [1.0]
    assert caplog.messages == [
        "slow has not returned for 0.01 seconds. If it hangs, end the run by Ctrl-C, twice."
    ]


def test_the_traceback_of_a_function_stands_before_the_sentence(capsys):
    def fails(prompts, completions):
        return [float(prompts)]

    assert terminal.run(lambda: call_scores(fails, ["p"], ["a"], {})) == terminal.INPUT_ERROR
    *lines, sentence = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert sum("File " in line for line in lines) == 1
    assert "return [float(prompts)]" in lines[2]
    assert sentence.startswith(f"error: fails ({os.path.relpath(__file__)}, line ")
    assert " raised TypeError: " in sentence
