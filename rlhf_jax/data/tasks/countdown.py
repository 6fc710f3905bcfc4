"""The task "countdown": an expression of some numbers that equals a target."""

import ast
import dataclasses
import operator
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rlhf_jax.checks import PositiveInt
from rlhf_jax.data.tasks.problems import Options, Problem, Task, filled
from rlhf_jax.errors import InputError
from rlhf_jax.rewards.answers import tagged_answer

MAX_COUNT = 10
MAX_LENGTH = 200  # characters of an expression; longer ones are wrong
_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclasses.dataclass(frozen=True)
class CountdownOptions(Options):
    """Options of the task "countdown".

    Attributes:
      count: how many numbers, from 2 to 10.
      max_number: the largest of them; the smallest is 1.
      template: of the question.
    """

    count: PositiveInt = 3
    max_number: PositiveInt = 20
    template: str = "Use {numbers}, each once, to make {target}:"

    def __post_init__(self) -> None:
        super().__post_init__()
        # Expressions of more numbers rarely have a value in the range of `draw`.
        if not 2 <= self.count <= MAX_COUNT:
            raise InputError(
                f"data.task: count must be from 2 to {MAX_COUNT}, but is {self.count}."
            )


def draw(rng: random.Random, options: CountdownOptions) -> Problem:
    """A problem that has a solution with +, - and *, whose value is positive."""
    numbers = [rng.randint(1, options.max_number) for _ in range(options.count)]
    while True:
        right, wrong = (_expression(rng, numbers) for _ in range(2))
        target, other = value_of(right)[0], value_of(wrong)[0]
        if 0 < target <= 10 * options.max_number and other != target:
            break
        numbers = [rng.randint(1, options.max_number) for _ in numbers]
    shuffled = " ".join(map(str, rng.sample(numbers, len(numbers))))
    question = filled(options.template, numbers=shuffled, target=target)
    key = f"{target}: {sorted(numbers)}"
    return Problem(key, question, right, wrong, {"numbers": numbers, "target": int(target)})


def _expression(rng: random.Random, numbers: Sequence[int]) -> str:
    """An expression of all numbers, from left to right."""
    first, *rest = rng.sample(numbers, len(numbers))
    text = str(first)
    for place, number in enumerate(rest):
        symbol = rng.choice("+-*")
        left = f"({text})" if symbol == "*" and place else text
        text = f"{left}{symbol}{number}"
    return text


def value_of(text: str) -> tuple[Fraction, list[int]]:
    """The value of an expression with + - * / and brackets, and its numbers.

    Raises:
      ValueError: the text is something else, or divides by zero.

    >>> value_of("(3 + 4) * 2")
    (Fraction(14, 1), [3, 4, 2])
    """
    if len(text) > MAX_LENGTH or not set(text) <= set("0123456789+-*/() "):
        raise ValueError(text)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        numbers: list[int] = []
        return _value(tree, numbers), numbers
    except (SyntaxError, ZeroDivisionError, MemoryError, RecursionError) as error:
        raise ValueError(text) from error


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, numbers), _value(node.right, numbers)
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError(ast.dump(node))


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    numbers: Sequence[Sequence[int]],
    target: Sequence[int],
    **columns: Any,
) -> list[float]:
    """1 where a completion is an expression of all numbers, each once, with the target's value.

    A completion is the text of its last `<answer>` element, or without one its last line, up to an
    equals sign.
    """
    del prompts, columns
    return [
        float(_solves(completion, of_problem, value))
        for completion, of_problem, value in zip(completions, numbers, target, strict=True)
    ]


def _solves(completion: Any, numbers: Sequence[int], target: int) -> bool:
    lines = tagged_answer(completion).strip().splitlines()
    try:
        value, used = value_of(lines[-1].partition("=")[0] if lines else "")
    except ValueError:
        return False
    return value == target and sorted(used) == sorted(numbers)


TASK = Task(CountdownOptions, draw)
