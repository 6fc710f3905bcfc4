"""Options and problems of all tasks, and their two splits."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from rlhf_jax.checks import Fraction, check_fields
from rlhf_jax.errors import InputError

Split = Literal["train", "eval"]

MAX_REPEATS = 2000  # draws without a new problem, after which all are taken to be drawn


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every task, in `data.task`.

    Attributes:
      noise: the share of completions that are wrong, for supervised fine-tuning.
      chat: whether prompts and completions are messages.
      held_out: the share of all problems that belongs to the evaluation split, by their hashes.
    """

    noise: Fraction = 0.0
    chat: bool = False
    held_out: Fraction = 0.2

    def __post_init__(self) -> None:
        check_fields("data.task", self)


class Problem(NamedTuple):
    """A problem and its answer.

    Attributes:
      key: equal for problems that are the same, such as 1 + 2 and 2 + 1.
      question: the prompt.
      answer: a right completion.
      wrong: a wrong one.
      columns: further ones, which the reward reads.
    """

    key: str
    question: str
    answer: str
    wrong: str
    columns: dict[str, Any] = {}


class Task(NamedTuple):
    """A task: its options, and a problem of it from a random generator and options."""

    options: type[Options]
    draw: Callable[[random.Random, Any], Problem]


def filled(template: str, **values: object) -> str:
    """The template of a question with its values; an InputError for names that it has not."""
    try:
        return template.format(**values)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        names = ", ".join(f"{{{name}}}" for name in values)
        raise InputError(
            f"data.task: the template {template!r} may hold {names} and no other braces."
        ) from None


def is_held_out(key: str, share: float) -> bool:
    """Whether a problem belongs to the evaluation split, whatever the seed."""
    digest = hashlib.sha256(key.encode()).digest()  # even over short keys, unlike a checksum
    return int.from_bytes(digest[:4]) < share * 2**32


def draw_problems(
    task: Task, options: Options, seed: int, count: int, split: Split
) -> list[Problem]:
    """Different problems of a split, a function of (options, seed, count, split).

    The splits share no problem. If a task has fewer different problems than wanted, those of the
    training split are repeated, and there are fewer of the evaluation split.

    Raises:
      InputError: the split has no problem.
    """
    drawn: list[Problem] = []
    if count == 0:
        return drawn
    for problem in _distinct(task, options, random.Random(f"{seed}/{split}"), split):
        if problem is None and (split == "eval" or not drawn):
            break
        if problem is not None:
            drawn.append(problem)
        if len(drawn) >= count:
            break
    if not drawn:
        raise InputError(f"data.task: with these options there is no problem of the split {split}.")
    return drawn


def _distinct(
    task: Task, options: Options, rng: random.Random, split: Split
) -> Iterator[Problem | None]:
    """Problems of a split, and None whenever all were drawn, after which they repeat."""
    seen: set[str] = set()
    repeats = 0
    while True:
        problem = task.draw(rng, options)
        is_new = problem.question not in seen
        if is_new and is_held_out(problem.key, options.held_out) == (split == "eval"):
            seen.add(problem.question)
            repeats = 0
            yield problem
        elif (repeats := repeats + 1) > MAX_REPEATS:
            seen.clear()
            repeats = 0
            yield None
