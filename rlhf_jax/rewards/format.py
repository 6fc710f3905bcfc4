"""Rewards by the format of a response, its length and its repetition."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_jax.errors import InputError
from rlhf_jax.rewards.answers import text_of


def format_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    pattern: str = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*",
    **columns: Any,
) -> list[float]:
    """1 where the regular expression matches a full completion; else 0. A dot matches line ends.

    Args:
      prompts, columns: not used.
      pattern: by default that of the prompts of DeepSeek-R1-Zero (arXiv:2501.12948, table 1).

    Raises:
      InputError: the pattern is no regular expression.

    >>> format_match(["", ""], ["Answer: 4", "4"], pattern=r"Answer: \\d+")
    [1.0, 0.0]
    """
    del prompts, columns
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(
            f"format_match: the pattern {pattern!r} is no regular expression ({error})."
        ) from None
    return [float(compiled.fullmatch(text_of(each)) is not None) for each in completions]


def length_penalty(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    completion_ids: Sequence[Sequence[int]],
    target: int,
    coefficient: float | None = None,
    unit: Literal["tokens", "characters"] = "tokens",
    only_longer: bool = False,
    **columns: Any,
) -> list[float]:
    """A penalty of the distance of each length to a target.

        - coefficient |length - target|

    Args:
      prompts, columns: not used.
      completion_ids: the tokens of each completion, end-of-text token included.
      target: the length wanted, in the unit.
      coefficient: by default 1 / target.
      unit: of lengths.
      only_longer: whether shorter completions have no penalty.

    Raises:
      InputError: the target is below 1, or the unit unknown.

    Aggarwal and Welleck, L1: Controlling How Long a Reasoning Model Thinks, eq. 1
    (arXiv:2503.04697), its second term.

    >>> length_penalty([""], ["abc"], completion_ids=[[5, 6, 0]], target=2)
    [-0.5]
    """
    del prompts, columns
    if target < 1 or unit not in ("tokens", "characters"):
        raise InputError(
            "length_penalty: target must be at least 1 and unit tokens or characters, but are "
            f"{target} and {unit!r}."
        )
    factor = 1.0 / target if coefficient is None else coefficient
    texts = [text_of(each) for each in completions]
    surplus = [len(each) - target for each in (texts if unit == "characters" else completion_ids)]
    return [-factor * (max(each, 0) if only_longer else abs(each)) for each in surplus]


def repetition_penalty(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    size: int = 3,
    max_penalty: float = -1.0,
    **columns: Any,
) -> list[float]:
    """A penalty of the share of repeated n-grams of words, in lower case.

        max_penalty (1 - number of different n-grams / number of n-grams)

    0 for completions of fewer than n words.

    Args:
      prompts, columns: not used.
      size: n.
      max_penalty: 0 or below.

    Raises:
      InputError: the size is below 1, or the penalty above 0.

    Yeo et al., Demystifying Long Chain-of-Thought Reasoning in LLMs, appendix (arXiv:2502.03373),
    as open-r1 has it (huggingface/open-r1, `get_repetition_penalty_reward`).

    >>> repetition_penalty(["", ""], ["no no no no", "one two three"], size=2)
    [-0.6666666666666667, 0.0]
    """
    del prompts, columns
    if size < 1 or max_penalty > 0:
        raise InputError(
            "repetition_penalty: size must be at least 1 and max_penalty at most 0, but are "
            f"{size} and {max_penalty}."
        )
    scores = []
    for completion in completions:
        words = text_of(completion).lower().split()
        ngrams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        scores.append(max_penalty * repeated if repeated else 0.0)
    return scores
