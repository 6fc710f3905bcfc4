"""A judge in Python: which of two responses is the better one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts

JudgeFunction = Callable[..., list[float]]


class Verdicts(NamedTuple):
    """What a judge says of two responses to each prompt.

    Attributes:
      preferences: float64[N], how far the second response is preferred, from 0 to 1: the mean of
        both orders.
      position_bias: by how much the response that is shown second is preferred whatever it is; 0
        of a judge that does not look at the order, at most 1/2.
    """

    preferences: np.ndarray
    position_bias: float


def judge_both_orders(
    judge: JudgeFunction,
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    columns: dict[str, list[Any]],
) -> Verdicts:
    """Asks about each pair twice, with either response in the second place.

        preference = (f(prompt, before, after) + 1 - f(prompt, after, before)) / 2
        position_bias = mean((f(prompt, before, after) + f(prompt, after, before)) / 2) - 1/2

    Judges, above all language models, tend to prefer a place (Zheng et al., Judging LLM-as-a-Judge,
    sections 3.3 and 3.4, arXiv:2306.05685); asked in both orders, that cancels.

    Args:
      judge: see `call_judge`.
      prompts, before, after: N texts each.
      columns: the other columns of the data set, N values each.

    Raises:
      InputError: the judge gave something else than it has to.
    """
    forwards = call_judge(judge, prompts, before, after, columns)
    backwards = call_judge(judge, prompts, after, before, columns)
    bias = float(np.mean((forwards + backwards) / 2)) - 0.5
    return Verdicts((forwards + 1.0 - backwards) / 2, bias)


def call_judge(
    judge: JudgeFunction,
    prompts: Sequence[str],
    responses_a: Sequence[str],
    responses_b: Sequence[str],
    columns: dict[str, list[Any]],
) -> np.ndarray:
    """judge(prompts, responses_a, responses_b, **columns), checked.

    Returns:
      float64[N], for each prompt the probability that response b, the second, is the better one: 0
      for a, 1 for b, 0.5 for a tie.

    With several hosts the first one asks and tells the others. What the judge raises goes on as it
    is, with a note that names the judge.

    Raises:
      InputError: it gave something else than one number from 0 to 1 a prompt.
    """
    return hosts.from_first(_call_judge, judge, prompts, responses_a, responses_b, columns)


def _call_judge(
    judge: JudgeFunction,
    prompts: Sequence[str],
    responses_a: Sequence[str],
    responses_b: Sequence[str],
    columns: dict[str, list[Any]],
) -> np.ndarray:
    name = getattr(judge, "__name__", "the judge")
    try:
        given = judge(list(prompts), list(responses_a), list(responses_b), **columns)
    except Exception as error:
        error.add_note(
            f"This was raised by the judge {name}, which is called as f(prompts, responses_a, "
            "responses_b, **columns)."
        )
        raise
    wanted = "one number from 0 (a is better) to 1 (b is better) for each prompt"
    try:
        answers = [_number(answer) for answer in given]
    except (TypeError, ValueError):
        raise InputError(
            f"The judge {name} gave {_line(given)}; it has to give {wanted}."
        ) from None
    if len(answers) != len(prompts):
        raise InputError(
            f"The judge {name} gave {len(answers)} answers for {len(prompts)} prompts; it has to "
            f"give {wanted}."
        )
    for answer, prompt in zip(answers, prompts, strict=True):
        if not 0 <= answer <= 1:  # NaN is neither
            raise InputError(
                f"The judge {name} gave {answer} for the prompt {prompt[:80]!r}; it has to give "
                f"{wanted}."
            )
    return np.asarray(answers, np.float64)


def _line(value: Any) -> str:
    """The beginning of what a value reads like, without line breaks."""
    return " ".join(str(value).split())[:80]


def _number(answer: Any) -> float:
    """The answer as a float; a text is none, even if it reads like one."""
    if isinstance(answer, str | bytes):
        raise TypeError(answer)
    return float(answer)
