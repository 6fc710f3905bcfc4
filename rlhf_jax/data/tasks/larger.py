"""The task "larger": the larger of two numbers."""

import dataclasses
import random

from rlhf_jax.checks import PositiveInt
from rlhf_jax.data.tasks.problems import Options, Problem, Task, filled
from rlhf_jax.rewards.answers import numeric_match


@dataclasses.dataclass(frozen=True)
class LargerOptions(Options):
    """Options of the task "larger".

    Attributes:
      digits: the number of digits of both numbers, without leading zeros.
      template: of the question.
    """

    digits: PositiveInt = 2
    template: str = "Which number is larger, {a} or {b}? Reply with the number only."


def draw(rng: random.Random, options: LargerOptions) -> Problem:
    """A problem of two different numbers."""
    low = 10 ** (options.digits - 1) if options.digits > 1 else 0
    a, b = rng.sample(range(low, 10**options.digits), 2)
    smaller, larger = sorted((a, b))
    question = filled(options.template, a=a, b=b)
    return Problem(f"{smaller},{larger}", question, str(larger), str(smaller))


reward = numeric_match
TASK = Task(LargerOptions, draw)
