"""The tasks of the package reasoning-gym, by name: `data.path: reasoning_gym:chain_sum`.

Stojanovski et al., Reasoning Gym (arXiv:2505.24760).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from rlhf_jax.data.tasks.problems import Problem, Split, is_held_out
from rlhf_jax.errors import InputError
from rlhf_jax.rewards.answers import tagged_answer


def _package() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(
            "The tasks reasoning_gym:NAME need the package reasoning-gym, which is not installed: "
            "pip install reasoning-gym."
        ) from error
    return reasoning_gym


def problems(
    name: str,
    options: Mapping[str, Any],
    seed: int,
    count: int,
    split: Split,
    held_out: float,
) -> list[Problem]:
    """Problems of a task, a function of (options, seed, count, split); the splits share none.

    Problems of the same words in another order belong to the same split.

    Args:
      options: arguments of `reasoning_gym.create_dataset`.
      held_out: the share of all problems that belongs to the evaluation split.

    Raises:
      InputError: the package or the task is missing, an option is wrong, or the task has too few
        different problems.
    """
    gym = _package()
    size = 50 * max(count, 1)  # of both splits
    try:
        entries = gym.create_dataset(name, seed=seed, size=size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"reasoning_gym:{name} cannot be made: {error}.") from error
    drawn: dict[str, Problem] = {}
    for index in range(size):
        if len(drawn) >= count:
            break
        entry = entries[index]
        question = entry["question"]
        # 2 * 3 and 3 * 2 belong to one split.
        words = " ".join(sorted(re.findall(r"\w+", question)))
        if is_held_out(words, held_out) == (split == "eval") and question not in drawn:
            answer = str(entry["answer"])
            columns = {"metadata": entry["metadata"], "task_name": name}
            drawn[question] = Problem(question, question, answer, "", columns)
    if len(drawn) < count and split == "train":
        raise InputError(
            f"reasoning_gym:{name} has {len(drawn)} different problems among {size}, but {count} "
            "are wanted: set data.builtin_rows lower, or other options in data.task."
        )
    return [*drawn.values()]


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    answer: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    task_name: Sequence[str],
    pattern: str | None = None,
    **columns: Any,
) -> list[float]:
    """The score by the package of each completion, from 0 to 1.

    An answer is the text of the last `<answer>` element of a completion, or without one the full
    text. The package gives a part of the score to many texts that merely contain the right answer.

    Args:
      pattern: a regular expression, such as "-?[0-9]+" for numbers, whose last match in that text
        is the answer; where nothing matches, the score is 0.
    """
    del prompts, columns
    gym = _package()
    return [
        _score(gym.get_score_answer_fn(name), _answer(completion, pattern), right, data)
        for completion, right, data, name in zip(
            completions, answer, metadata, task_name, strict=True
        )
    ]


def _answer(completion: str, pattern: str | None) -> str | None:
    """The answer in a completion, None where nothing matches the pattern."""
    text = tagged_answer(completion).strip()
    if pattern is None:
        return text
    matches = [match.group() for match in re.finditer(pattern, text)]
    return matches[-1] if matches else None


def _score(score_answer: Any, answer: str | None, right: str, metadata: Any) -> float:
    """0 too for a text that the package cannot read, such as a word where it wants a number."""
    try:
        entry = {"answer": right, "metadata": metadata}
        return 0.0 if answer is None else float(score_answer(answer, entry))
    except (ValueError, ArithmeticError, LookupError, SyntaxError, TypeError):
        return 0.0
