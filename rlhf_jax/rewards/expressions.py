"""Equality of mathematical expressions, by the package math-verify."""

from collections.abc import Sequence
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.rewards.answers import text_of

try:
    import math_verify
except ImportError as error:  # when the name of the reward is read, before any work
    raise InputError(
        "rlhf_jax.rewards:math_match needs the package math-verify, which is not installed: "
        "pip install math-verify."
    ) from error


def math_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1 where a completion's last expression equals the answer, by math-verify; else 0.

    Fractions, roots, sets and intervals in LaTeX or plain text are compared by their values. None
    where the answer itself cannot be parsed, so that no score counts. Parsing may take seconds:
    give the source `num_processes` and a `timeout`.

    Args:
      prompts, columns: not used.
      answer: expressions, as texts or numbers.
    """
    del prompts, columns
    scores: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        text = str(expected)
        # Without a delimiter LaTeX such as \frac{1}{2} is not found.
        right = math_verify.parse(text if "$" in text or "\\boxed" in text else f"${text}$")
        parsed = math_verify.parse(text_of(completion))
        scores.append(float(math_verify.verify(right, parsed)) if right else None)
    return scores
