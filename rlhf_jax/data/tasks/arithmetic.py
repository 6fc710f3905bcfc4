"""The task "arithmetic": sums, differences and products of two numbers."""

import dataclasses
import random

from rlhf_jax.checks import PositiveInt
from rlhf_jax.data.tasks.problems import Options, Problem, Task, filled
from rlhf_jax.errors import InputError
from rlhf_jax.rewards.answers import numeric_match

_VALUES = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclasses.dataclass(frozen=True)
class ArithmeticOptions(Options):
    """Options of the task "arithmetic".

    Attributes:
      digits: the number of digits of both numbers, from 0 on: at most 99 for 2.
      operators: those that are drawn, each of "+", "-" and "*".
      template: of the question.
    """

    digits: PositiveInt = 2
    operators: str = "+"
    template: str = "{a}{operator}{b}="

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.operators or not {*self.operators} <= {*_VALUES}:
            raise InputError(f"data.task: operators are of +, - and *, but are {self.operators!r}.")


def draw(rng: random.Random, options: ArithmeticOptions) -> Problem:
    """A problem of two numbers."""
    a, b = (rng.randrange(10**options.digits) for _ in range(2))
    operator = rng.choice(options.operators)
    value = _VALUES[operator](a, b)
    wrong = value + rng.choice((-1, 1)) * rng.randint(1, 10)
    ordered = (a, b) if operator == "-" else sorted((a, b))
    question = filled(options.template, a=a, b=b, operator=operator)
    return Problem(f"{operator}{ordered}", question, str(value), str(wrong))


reward = numeric_match
TASK = Task(ArithmeticOptions, draw)
