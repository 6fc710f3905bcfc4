"""Tasks whose answers can be verified: each file has the problems and the reward of one.

`data.path` names a task as "task:arithmetic", and `rewards` its reward as
`rlhf_jax.data.tasks.arithmetic:reward`. Problems are made from `data.seed` and the options in
`data.task`. No problem of the evaluation split occurs in the training split, whatever the seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from rlhf_jax.data.tasks import (
    arithmetic,
    calculator,
    countdown,
    guessing,
    larger,
    letters,
    reasoning_gym,
    sorting,
)
from rlhf_jax.data.tasks.problems import Options, Problem, Split, Task, draw_problems
from rlhf_jax.errors import InputError

OWN, OF_REASONING_GYM = "task:", "reasoning_gym:"
SHARED = ("noise", "chat", "held_out")  # the options of all tasks

TASKS: dict[str, Task] = {
    "arithmetic": arithmetic.TASK,
    "calculator": calculator.TASK,
    "countdown": countdown.TASK,
    "guessing": guessing.TASK,
    "larger": larger.TASK,
    "letters": letters.TASK,
    "sorting": sorting.TASK,
}


def is_task(path: str) -> bool:
    """Whether a path names a task, and no file."""
    return path.startswith((OWN, OF_REASONING_GYM))


def options_of(path: str, values: Mapping[str, Any]) -> Options:
    """The options of "task:NAME", or those that all tasks have of "reasoning_gym:NAME".

    Raises:
      InputError: there is no such task or option, or a value is wrong.
    """
    if path.startswith(OF_REASONING_GYM):
        options = Options(**{name: x for name, x in values.items() if name in SHARED})
        if options.noise:
            raise InputError(f"data.task: {path} has no wrong answers: leave noise out.")
        return options
    task = TASKS.get(path.removeprefix(OWN))
    if task is None:
        raise InputError(
            f"data.path is {path!r}: the tasks are {', '.join(map(OWN.__add__, TASKS))}."
        )
    names = [*task.options.__dataclass_fields__]
    for name in values:
        if name not in names:
            raise InputError(
                f"data.task has the option {name!r}, but those of {path} are {', '.join(names)}."
            )
    return task.options(**values)


def problems_of(
    path: str, values: Mapping[str, Any], seed: int, count: int, split: Split
) -> list[Problem]:
    """The problems of a task in a split, a function of the arguments."""
    options = options_of(path, values)
    if path.startswith(OF_REASONING_GYM):
        own = {name: x for name, x in values.items() if name not in SHARED}
        name = path.removeprefix(OF_REASONING_GYM)
        return reasoning_gym.problems(name, own, seed, count, split, options.held_out)
    return draw_problems(TASKS[path.removeprefix(OWN)], options, seed, count, split)


def texts(
    path: str, values: Mapping[str, Any], seed: int, count: int, split: Split
) -> list[dict[str, Any]]:
    """Examples with `prompt` and `completion`; round(noise * count) completions are wrong.

    Those of the evaluation split are all right.
    """
    options = options_of(path, values)
    problems = problems_of(path, values, seed, count, split)
    rng, noise = random.Random(f"{seed}/noise"), options.noise if split == "train" else 0.0
    wrong = {*rng.sample(range(len(problems)), round(noise * len(problems)))}
    return [
        {
            "prompt": _turn("user", problem.question, options),
            "completion": _turn(
                "assistant", problem.wrong if number in wrong else problem.answer, options
            ),
        }
        for number, problem in enumerate(problems)
    ]


def prompts(
    path: str, values: Mapping[str, Any], seed: int, count: int, split: Split
) -> list[dict[str, Any]]:
    """Examples with `prompt`, `answer` and further columns that the reward of the task reads."""
    options = options_of(path, values)
    return [
        {
            "prompt": _turn("user", problem.question, options),
            "answer": problem.answer,
            **problem.columns,
        }
        for problem in problems_of(path, values, seed, count, split)
    ]


def pairs(
    path: str, values: Mapping[str, Any], seed: int, count: int, split: Split
) -> list[dict[str, Any]]:
    """Preferences: `prompt`, `chosen` (the answer), `rejected` (a wrong one) and `margin` (0)."""
    options = options_of(path, values)
    if path.startswith(OF_REASONING_GYM):
        raise InputError(f"{path} has no wrong answers, and so no pairs.")
    return [
        {
            "prompt": _turn("user", problem.question, options),
            "chosen": _turn("assistant", problem.answer, options),
            "rejected": _turn("assistant", problem.wrong, options),
            "margin": 0.0,
        }
        for problem in problems_of(path, values, seed, count, split)
    ]


def _turn(role: str, text: str, options: Options) -> Any:
    return [{"role": role, "content": text}] if options.chat else text
