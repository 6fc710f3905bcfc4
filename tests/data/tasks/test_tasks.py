"""Tasks with answers that can be verified: splits, seeds, noise, and their rewards."""

import importlib
import re
import sys
import types

import pytest

from rlhf_jax.data import DataSettings, load_examples, tasks
from rlhf_jax.data.tasks import countdown, reasoning_gym, sorting
from tests.runtime.messages import message

OPTIONS = {
    "arithmetic": {"operators": "+-*"},
    "calculator": {"digits": 2},
    "countdown": {},
    "guessing": {},
    "larger": {},
    "letters": {"syllables": 2},
    "sorting": {},
}


def settings(name, **values):
    return DataSettings(path=f"task:{name}", task=OPTIONS[name], eval_rows=60, **values)


def question(example):
    """The identity of a problem: the words and numbers of its prompt in any order."""
    prompt = example["prompt"]
    if "-" in prompt or "letter" in prompt:
        return prompt
    target = prompt.partition("make")[2]
    return target, tuple(sorted(re.findall(r"\d+|[*+]", prompt)))


def test_every_task_is_tested():
    assert {*OPTIONS} == {*tasks.TASKS}


@pytest.mark.parametrize("name", OPTIONS)
def test_right_answers_score_one_wrong_ones_zero_and_splits_share_no_problem(name):
    reward = importlib.import_module(f"rlhf_jax.data.tasks.{name}").reward
    held_out = set()
    for seed in (0, 1):
        data = settings(name, seed=seed, builtin_rows=100)
        examples, evaluation = load_examples(data, "prompts")
        assert (examples, evaluation) == load_examples(data, "prompts")
        assert len({example["prompt"] for example in examples}) == 100
        prompts = [example["prompt"] for example in examples]
        columns = {
            key: [example[key] for example in examples] for key in examples[0] if key != "prompt"
        }
        pairs, _ = load_examples(data, "pairs")
        right, wrong = (
            reward(prompts, [pair[side] for pair in pairs], **columns)
            for side in ("chosen", "rejected")
        )
        # Several guesses of a number score less than one.
        assert min(right) > 0 if name == "guessing" else right == [1.0] * 100
        assert wrong == [0.0] * 100
        assert reward(prompts, ["", "?"] * 50, **columns) == [0.0] * 100
        held_out |= {question(example) for example in evaluation}
    assert load_examples(settings(name, seed=0, builtin_rows=100), "prompts")[0] != examples
    train, _ = load_examples(settings(name, seed=2, builtin_rows=500), "prompts")
    assert not held_out & {question(example) for example in train}


def test_noise_is_an_exact_share_of_the_training_texts():
    data = DataSettings(
        path="task:arithmetic", task={"noise": 0.3}, builtin_rows=50, eval_rows=20, seed=3
    )
    for examples, wrong in zip(load_examples(data, "text"), (15, 0), strict=True):
        sums = [
            (sum(map(int, each["prompt"][:-1].split("+"))), each["completion"]) for each in examples
        ]
        assert sum(str(value) != text for value, text in sums) == wrong


def test_no_held_out_examples_are_none():
    _, evaluation = load_examples(DataSettings(path="task:arithmetic", eval_rows=0), "prompts")
    assert evaluation == []


def test_small_tasks_repeat_in_training_only_and_messages():
    options = {"digits": 1, "chat": True, "template": "What is {a} + {b}?", "held_out": 0.3}
    data = DataSettings(path="task:arithmetic", task=options, builtin_rows=300, eval_rows=300)
    train, evaluation = load_examples(data, "prompts")
    texts = [[each["prompt"][0]["content"] for each in part] for part in (train, evaluation)]
    assert len(train) == 300
    assert len({*texts[0]}) + len({*texts[1]}) == 100
    assert len(texts[1]) == len({*texts[1]}) > 20
    text = load_examples(data, "text")[0][0]
    assert [text[key][0]["role"] for key in ("prompt", "completion")] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("(3 + 4) * 2 = 14", 1.0),
        ("so\n3*4+2\n<answer>2*(4+3)</answer>", 1.0),
        ("2*(4+3", 0.0),
        ("7*2", 0.0),
        ("3+4*2", 0.0),
        ("2**4-2", 0.0),
        ("3/(4-4)", 0.0),
        ("(" * 150, 0.0),
        ("__import__('os')", 0.0),
    ],
)
def test_countdown_reads_expressions_and_runs_nothing(text, score):
    assert countdown.reward([""], [text], numbers=[[2, 3, 4]], target=[14]) == [score]


def test_sorting_reads_tags():
    completions = ["<think>9 1</think><answer>1, 9</answer>", "9 1", "1 9 9"]
    assert sorting.reward([""] * 3, completions, answer=["1 9"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"path": "task:sums"}, "the tasks are task:arithmetic, task:calculator"),
        ({"path": "task:arithmetic", "task": {"digit": 1}}, "has the option 'digit', but those"),
        ({"path": "task:arithmetic", "task": {"digits": 0}}, "data.task.digits must be above 0"),
        ({"path": "task:arithmetic", "task": {"operators": "/"}}, "operators are of +, - and *"),
        ({"path": "task:sorting", "task": {"count": 11}}, "count must be from 2 to 10^digits = 10"),
        (
            {"path": "task:countdown", "task": {"count": 11}},
            "count must be from 2 to 10, but is 11",
        ),
        ({"path": "rows.jsonl", "task": {"digits": 1}}, "give it a path such as task:arithmetic"),
        ({"path": "task:larger", "split": "test"}, '"task:larger" has no parts'),
    ],
)
def test_wrong_options_are_one_sentence(values, expected):
    assert expected in message(DataSettings, **values)


def test_a_template_with_other_names_is_one_sentence():
    data = DataSettings(path="task:arithmetic", builtin_rows=1, task={"template": "{x}+{b}="})
    assert "may hold {a}, {b}, {operator}" in message(load_examples, data, "prompts")


def test_a_template_that_reads_attributes_is_one_sentence():
    for template in ("{a[0]}", "{a.x}"):
        options = {"template": template}
        data = DataSettings(path="task:arithmetic", builtin_rows=1, eval_rows=0, task=options)
        assert "may hold {a}, {b}, {operator}" in message(load_examples, data, "prompts")


def test_reasoning_gym(monkeypatch):
    data = DataSettings(
        path="reasoning_gym:chain_sum", task={"max_terms": 3}, builtin_rows=20, eval_rows=5
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "reasoning_gym", None)
        assert "pip install reasoning-gym" in message(load_examples, data, "prompts")
    pytest.importorskip("reasoning_gym")
    examples, evaluation = load_examples(data, "prompts")
    assert (len(examples), len(evaluation)) == (20, 5)
    assert not {each["prompt"] for each in examples} & {each["prompt"] for each in evaluation}
    columns = {
        key: [example[key] for example in examples] for key in examples[0] if key != "prompt"
    }
    right = [f"<answer>{example['answer']}</answer>" for example in examples]
    assert reasoning_gym.reward([], right, **columns) == [1.0] * 20
    assert max(reasoning_gym.reward([], ["none"] * 20, **columns)) < 1.0
    wrong = DataSettings(path="reasoning_gym:chain_sum", task={"terms": 3})
    assert "reasoning_gym:chain_sum cannot be made" in message(load_examples, wrong, "prompts")
    unknown = DataSettings(path="reasoning_gym:none")
    assert "reasoning_gym:none cannot be made" in message(load_examples, unknown, "prompts")


def test_reasoning_gym_reads_an_answer_by_a_pattern(monkeypatch):
    """With a stand-in for the package, whose verifiers raise at some texts."""
    entry = {"question": "", "answer": "56", "metadata": {}}
    orders = [f"{a} * {b}?" for a in range(10) for b in range(10)]
    gym = types.SimpleNamespace(
        create_dataset=lambda *_, size, **__: [{**entry, "question": x} for x in orders * size],
        get_score_answer_fn=lambda name: lambda text, entry: float(int(text) == 56),
    )
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    texts = ["7 * 8 = 56.", "56 or 57", "<answer>56</answer> 3", "fifty-six"]
    columns = {key: [entry[key]] * 4 for key in ("answer", "metadata")}
    columns["task_name"] = ["products"] * 4
    assert reasoning_gym.reward([], texts, pattern="[0-9]+", **columns) == [1.0, 0.0, 1.0, 0.0]
    assert reasoning_gym.reward([], texts, **columns) == [0.0, 0.0, 1.0, 0.0]
    train, held_out = (
        reasoning_gym.problems("products", {}, 0, 30, split, 0.5) for split in ("train", "eval")
    )
    both = [{tuple(sorted(each.question)) for each in split} for split in (train, held_out)]
    assert len(held_out) == 30
    assert not both[0] & both[1]
