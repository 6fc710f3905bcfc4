"""A judge in Python, which compares two responses to a prompt."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import InputError, shown
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.rewards.functions import call_function

JudgeFunction = Callable[..., list[float]]
JUDGED = ("prompts", "responses_a", "responses_b")  # its arguments by position


class Verdicts(NamedTuple):
    """The answers of a judge about two responses to each of N prompts.

    Attributes:
      preferences: float64[N], the probability that the second response is better, from 0 to 1: the
        mean of both orders.
      position_bias: the preference for the response shown second, whichever it is, from -1/2 to
        1/2; 0 of a judge that ignores the order.
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
    """Calls the judge twice, with the responses of each pair in both orders.

        preference = (f(prompt, before, after) + 1 - f(prompt, after, before)) / 2
        position_bias = mean((f(prompt, before, after) + f(prompt, after, before)) / 2) - 1/2

    Judges, above all language models, are biased to a position (Zheng et al., Judging
    LLM-as-a-Judge, sections 3.3 and 3.4, arXiv:2306.05685), which cancels in the mean of both
    orders.

    Args:
      judge: see `call_judge`.
      prompts, before, after: N texts each.
      columns: the other columns of the data set, N values each.

    Raises:
      InputError: an answer is not of the right type or range.
    """
    forwards = call_judge(judge, prompts, before, after, columns)
    backwards = call_judge(judge, prompts, after, before, columns)
    bias = float(np.mean((forwards + backwards) / 2)) - 0.5
    return Verdicts((forwards + 1.0 - backwards) / 2, bias)


def win_rates(
    judge: JudgeFunction,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    columns: dict[str, list[Any]],
) -> np.ndarray:
    """f32[N, K]: the mean probability that a response wins against the others to its prompt.

    Each two of the K responses are judged in both orders, in K * (K - 1) calls of N pairs each.

    Args:
      judge, prompts, columns: as in `judge_both_orders`.
      responses: K lists of N texts, K at least 2.
    """
    count = len(responses)
    wins = np.zeros((len(prompts), count))
    for i, j in itertools.combinations(range(count), 2):
        texts = (prompts, responses[i], responses[j])
        preferences = judge_both_orders(judge, *texts, columns).preferences
        wins[:, i] += 1.0 - preferences
        wins[:, j] += preferences
    return np.asarray(wins / (count - 1), np.float32)


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

    With several hosts the first one calls the judge and broadcasts the answers.

    Raises:
      InputError: the result is not one number from 0 to 1 for each prompt; as a FunctionError, the
        judge raises something.
    """
    texts = list(prompts), list(responses_a), list(responses_b)
    return hosts.from_first(_call_judge, judge, texts, columns)


def _call_judge(
    judge: JudgeFunction, texts: tuple[list[str], ...], columns: dict[str, list[Any]]
) -> np.ndarray:
    name, prompts = f"The judge {getattr(judge, '__name__', '')}", texts[0]
    expected = "one number from 0 (a is better) to 1 (b is better) for each prompt"
    values = call_function(
        judge,
        name,
        texts,
        columns,
        nouns=("answers", "prompts"),
        expected=expected,
    )
    try:
        answers = [_number(value) for value in values]
    except (TypeError, ValueError):
        raise InputError(f"{name} gave {shown(values)}; it has to give {expected}.") from None
    for answer, prompt in zip(answers, prompts, strict=True):
        if not 0 <= answer <= 1:  # NaN is neither
            raise InputError(
                f"{name} gave {answer} for the prompt {prompt[:80]!r}; it has to give {expected}."
            )
    return np.asarray(answers, np.float64)


def _number(answer: Any) -> float:
    """The answer as a float; a text is refused, even one that `float` would read."""
    if isinstance(answer, str | bytes):
        raise TypeError(answer)
    try:
        return float(answer)
    except OverflowError:
        return math.inf
