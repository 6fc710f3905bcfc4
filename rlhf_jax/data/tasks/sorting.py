"""The task "sorting": numbers in increasing order."""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any

from rlhf_jax.checks import PositiveInt
from rlhf_jax.data.tasks.problems import Options, Problem, Task, filled
from rlhf_jax.errors import InputError
from rlhf_jax.rewards.answers import tagged_answer


@dataclasses.dataclass(frozen=True)
class SortingOptions(Options):
    """Options of the task "sorting".

    Attributes:
      count: how many different numbers, at least 2.
      digits: the largest number of their digits.
      template: of the question.
    """

    count: PositiveInt = 4
    digits: PositiveInt = 1
    template: str = "Sort {numbers}:"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.count <= 10**self.digits:
            raise InputError(
                f"data.task: count must be from 2 to 10^digits = {10**self.digits}, but is "
                f"{self.count}."
            )


def draw(rng: random.Random, options: SortingOptions) -> Problem:
    """A problem of different numbers; those with the same ones are the same problem."""
    numbers = rng.sample(range(10**options.digits), options.count)
    right = sorted(numbers)
    place = rng.randrange(options.count - 1)
    wrong = [*right[:place], right[place + 1], right[place], *right[place + 2 :]]
    shuffled, answer, other = (" ".join(map(str, each)) for each in (numbers, right, wrong))
    return Problem(answer, filled(options.template, numbers=shuffled), answer, other)


def reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str], **columns: Any
) -> list[float]:
    """1 where the numbers of a completion are those of the answer in its order; else 0."""
    del prompts, columns
    return [
        float(re.findall(r"\d+", tagged_answer(completion)) == right.split())
        for completion, right in zip(completions, answer, strict=True)
    ]


TASK = Task(SortingOptions, draw)
