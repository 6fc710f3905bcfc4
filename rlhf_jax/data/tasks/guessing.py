"""The task "guessing": a secret number, and the environment that compares guesses with it."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from rlhf_jax.checks import PositiveInt
from rlhf_jax.data.tasks.problems import Options, Problem, Task, filled
from rlhf_jax.rewards.answers import last_number, text_of


@dataclasses.dataclass(frozen=True)
class GuessingOptions(Options):
    """Options of the task "guessing".

    Attributes:
      max_number: the largest number of all problems; the smallest is 0.
      template: of the question.
    """

    max_number: PositiveInt = 99
    template: str = "Guess a number from {low} to {high}:"


def draw(rng: random.Random, options: GuessingOptions) -> Problem:
    """A number between two others; the right completion halves the interval, line by line."""
    low, high = sorted(rng.randint(0, options.max_number) for _ in range(2))
    secret = rng.randint(low, high)
    question = filled(options.template, low=low, high=high)
    lines, left, right = list[str](), low, high
    while (guess := (left + right) // 2) != secret:
        lines += [str(guess), _hint(guess, secret)]
        left, right = (guess + 1, right) if guess < secret else (left, guess - 1)
    answer, wrong = "\n".join([*lines, str(secret)]), str(secret + 1)
    return Problem(f"{low},{high}", question, answer, wrong, {"secret": secret})


def _hint(guess: object, secret: int) -> str:
    if guess is None:
        return "not a number"
    return "higher" if guess < secret else "lower"  # type: ignore[operator]


def _guesses(transcript: str) -> list[Any]:
    """The last number of each line that is not a hint; None where it has none."""
    hints = ("", "higher", "lower", "not a number")
    lines = [line.strip() for line in transcript.splitlines()]
    return [last_number(line) for line in lines if line not in hints]


def environment(
    prompts: Sequence[str], transcripts: Sequence[str], *, secret: Sequence[int], **columns: Any
) -> list[str | None]:
    r"""A line on the last guess of each transcript: "higher", "lower"; None after the right one.

    For `grpo.stop_strings: ["\n"]`. A turn that does not end its line has it ended.

    >>> environment([""] * 3, ["5\n", "5\nhigher\n7", "?"], secret=[3, 7, 3])
    ['lower\n', None, '\nnot a number\n']
    """
    del prompts, columns
    return [_reply(text, number) for text, number in zip(transcripts, secret, strict=True)]


def _reply(text: str, secret: int) -> str | None:
    guess = (_guesses(text) or [None])[-1]
    if guess == secret:
        return None
    return ("" if text.endswith("\n") else "\n") + _hint(guess, secret) + "\n"


def reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, secret: Sequence[int], **columns: Any
) -> list[float]:
    """1 / n where the n-th guess is the number and the last one; else 0."""
    del prompts, columns
    scores = []
    for completion, number in zip(completions, secret, strict=True):
        guesses = _guesses(text_of(completion))
        scores.append(1.0 / len(guesses) if guesses and guesses[-1] == number else 0.0)
    return scores


TASK = Task(GuessingOptions, draw)
