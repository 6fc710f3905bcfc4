"""Rewards by the answer to a prompt, which stands in the column `answer` of the data."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rlhf_jax.errors import InputError

# A sign counts where no word, number or bracket stands before it: "3-5" ends in 5.
_NUMBER = re.compile(r"(?:(?<![\w)\]])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the content of the last of its messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def tagged_answer(completion: Any) -> str:
    """The text of the last <answer> element of a completion, or without one the full text.

    >>> tagged_answer("<think>2 + 2</think> <answer>4</answer>")
    '4'
    """
    text = text_of(completion)
    elements = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return elements[-1] if elements else text


def last_number(text: str) -> Decimal | None:
    """The last number of a text in decimal notation; None if there is none.

    Commas may separate thousands.

    >>> last_number("12 + 30 = 42."), last_number("1,250 and -0.5"), last_number("none")
    (Decimal('42'), Decimal('-0.5'), None)
    """
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    answer: Sequence[Any],
    ignore_case: bool = False,
    **columns: Any,
) -> list[float]:
    """1 where a completion is the answer, white space at both ends not counted; else 0.

    Args:
      prompts, columns: not used.
      answer: texts or numbers.
      ignore_case: whether upper and lower case are equal.

    >>> exact_match(["", ""], [" Paris", "Lyon."], answer=["Paris", "Lyon"])
    [1.0, 0.0]
    """
    del prompts, columns

    def plain(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    pairs = zip(completions, answer, strict=True)
    return [float(plain(text_of(text)) == plain(str(expected))) for text, expected in pairs]


def numeric_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    answer: Sequence[Any],
    tolerance: float = 0.0,
    **columns: Any,
) -> list[float]:
    """1 where the last number of a completion is that of the answer; else 0, also without a number.

    Args:
      prompts, columns: not used.
      answer: numbers, or texts whose last number counts, such as those of GSM8K.
      tolerance: the largest difference of equal numbers.

    Raises:
      InputError: an answer has no number.

    >>> numeric_match(["", ""], ["It is 1,200.", "7 or 8"], answer=[1200, "so it is 7"])
    [1.0, 0.0]
    """
    del prompts, columns
    scores = []
    for completion, expected in zip(completions, answer, strict=True):
        right, number = last_number(str(expected)), last_number(text_of(completion))
        if right is None:
            raise InputError(
                f"numeric_match: the answer {str(expected)[:60]!r} has no number; use exact_match "
                "for answers that are texts."
            )
        is_right = number is not None and abs(number - right) <= Decimal(str(tolerance))
        scores.append(float(is_right))
    return scores
