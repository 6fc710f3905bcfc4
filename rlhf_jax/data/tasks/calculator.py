"""The task "calculator": products that a tool computes, and the environment with the tool.

An expression between `<<` and `=` is replied to with its value and `>>`: the annotations of GSM8K
(Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168, appendix C).
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any

from rlhf_jax.checks import PositiveInt
from rlhf_jax.data.tasks.countdown import value_of
from rlhf_jax.data.tasks.problems import Options, Problem, Task, filled
from rlhf_jax.rewards.answers import numeric_match

_CALL = re.compile(r"<<([^<>=]*)=\Z")


@dataclasses.dataclass(frozen=True)
class CalculatorOptions(Options):
    """Options of the task "calculator".

    Attributes:
      digits: of both numbers, without leading zeros.
      template: of the question.
    """

    digits: PositiveInt = 3
    template: str = "What is {a}*{b}?"


def draw(rng: random.Random, options: CalculatorOptions) -> Problem:
    """A product of two numbers; the wrong completion has it without the tool."""
    low, high = 10 ** (options.digits - 1), 10**options.digits
    a, b = rng.randrange(low, high), rng.randrange(low, high)
    value, question = a * b, filled(options.template, a=a, b=b)
    wrong = str(value + rng.choice((-1, 1)) * rng.randint(1, low))
    answer = f"<<{a}*{b}={value}>>{value}"
    return Problem(f"{min(a, b)}*{max(a, b)}", question, answer, wrong, {"result": str(value)})


def environment(
    prompts: Sequence[str], transcripts: Sequence[str], **columns: Any
) -> list[str | None]:
    """The value of a call at the end of a transcript; nothing after another "=".

    For `grpo.stop_strings: ["="]`. Any other end is that of the response.

    >>> environment([""] * 3, ["<<12*12=", "x =", "144"])
    ['144>>', '', None]
    """
    del prompts, columns
    return [_reply(text) for text in transcripts]


def _reply(text: str) -> str | None:
    if not text.endswith("="):
        return None
    call = _CALL.search(text)
    if call is None:
        return ""
    try:
        return f"{value_of(call[1])[0]}>>"
    except ValueError:
        return "error>>"


def reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, result: Sequence[str], **columns: Any
) -> list[float]:
    """1 where the last number of a completion is the product; else 0."""
    return numeric_match(prompts, completions, answer=result)


TASK = Task(CalculatorOptions, draw)
