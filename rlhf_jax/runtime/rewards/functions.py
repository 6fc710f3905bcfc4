"""Score functions in Python: imported by name, called, and their results checked."""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts

ScoreFunction = Callable[..., list[float]]


def load_function(name: str) -> ScoreFunction:
    """The function that "module:function" names.

    Raises:
      InputError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{name!r} names no function ({error}); write it as module:function, importable from "
            "here."
        ) from error
    if not callable(function):
        raise InputError(f"{name!r} is not a function; write it as module:function.")
    return function


def check_call(function: ScoreFunction, columns: Iterable[str]) -> None:
    """Raises an InputError if function(prompts, completions, **columns) is no valid call."""
    name = getattr(function, "__name__", "the score function")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # some functions in C have no signature
    try:
        signature.bind([], [], **dict.fromkeys(columns, []))
    except TypeError as error:
        raise InputError(
            f"{name} cannot be called as {name}(prompts, completions, **columns) with the other "
            f"columns of the data by name ({error}): let it take **columns, and call no column "
            "prompts or completions."
        ) from None


def call_scores(
    function: ScoreFunction, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> list[float]:
    """function(prompts, completions, **columns), checked: one finite number for each completion.

    With several hosts the first one calls the function. Its exceptions get a note with its name.

    Raises:
      InputError: the result is not a list of finite numbers of the right length.
    """
    return hosts.from_first(_call_scores, function, prompts, completions, columns)


def _call_scores(
    function: ScoreFunction, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> list[float]:
    name = getattr(function, "__name__", "the score function")
    try:
        result = function(prompts, completions, **columns)
    except Exception as error:
        error.add_note(f"This was raised by {name}, which was to score {len(completions)} texts.")
        raise
    if isinstance(result, (str, bytes, Mapping)) or not isinstance(result, Iterable):
        raise InputError(
            f"{name} gave {str(result)[:80]}; it has to give a list of numbers, one for each "
            "completion."
        )
    values = list(result)
    if len(values) != len(completions):
        raise InputError(
            f"{name} gave {len(values)} scores for {len(completions)} completions; it has to give "
            "one for each."
        )
    return [
        _finite_number(name, index, value, completion)
        for index, (value, completion) in enumerate(zip(values, completions, strict=True))
    ]


def _finite_number(name: str, index: int, value: Any, completion: str) -> float:
    try:
        if isinstance(value, (str, bytes)) or np.ndim(value) > 0:
            raise TypeError
        score = float(value)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} gave {repr(value)[:80]} at index {index}; it has to give a number for each "
            "completion."
        ) from None
    if not math.isfinite(score):
        raise InputError(
            f"{name} gave the score {score} for the completion {completion[:80]!r} at index "
            f"{index}; it has to give a finite number."
        )
    return score
