"""Score functions in Python: imported by name, called, and their results checked."""

import contextlib
import importlib
import inspect
import itertools
import logging
import math
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from rlhf_jax.errors import FunctionError, InputError, shown

_logger = logging.getLogger(__name__)

ScoreFunction = Callable[..., list[float]]

PATIENCE = 120.0  # seconds of a call after which a warning is logged

IDS = "completion_ids"  # the parameter that gets the tokens of the completions


class NotFiniteError(InputError):
    """A score is infinite or NaN."""


def load_function(name: str) -> ScoreFunction:
    """The function that "module:function" names.

    Raises:
      InputError: there is no such module or function, or the module cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise InputError(f"{name!r} names no function; write it as module:function, not as a path.")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{name!r} names no function ({error}); write it as module:function, importable from "
            "here."
        ) from error
    except InputError:  # such as a package that is not installed
        raise
    except (Exception, SystemExit) as error:  # of the module's own lines
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f", {line.filename}, line {line.lineno}"
        raise InputError(
            f"The module of {name!r} cannot be imported ({type(error).__name__}: {error}{where})."
        ) from error
    if not callable(function):
        raise InputError(f"{name!r} is not a function; write it as module:function.")
    return function


def check_call(
    function: Callable[..., Any],
    columns: Iterable[str],
    names: Sequence[str] = ("prompts", "completions"),
) -> None:
    """Raises an InputError if function(prompts, completions, **columns) is no valid call.

    Args:
      names: of the arguments by position.
    """
    name = getattr(function, "__name__", "the score function")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # some functions in C have no signature
    try:
        signature.bind(*([] for _ in names), **dict.fromkeys(columns, []))
    except TypeError as error:
        raise InputError(
            f"{name} cannot be called as {name}({', '.join(names)}, **columns) with the other "
            f"columns of the data by name ({error}): let it take **columns, and call no column "
            f"{' or '.join(names)}."
        ) from None


def reads_ids(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter for the tokens of the completions."""
    try:
        return IDS in inspect.signature(function).parameters
    except ValueError:
        return False  # some functions in C have no signature


def call_scores(
    function: ScoreFunction, prompts: list[Any], completions: list[Any], columns: dict[str, list]
) -> list[float]:
    """function(prompts, completions, **columns), checked: one finite number for each completion.

    The function receives lists of its own. With several hosts the first one calls it.

    Raises:
      InputError: the result is not a list of finite numbers of the right length, or the function
        ends the program; as a FunctionError, the function raises something.
    """
    from rlhf_jax.parallel import hosts  # which the processes of a pool do not need, nor jax

    return hosts.from_first(scores_of, function, prompts, completions, columns)


def scores_of(
    function: ScoreFunction,
    prompts: list[Any],
    completions: list[Any],
    columns: dict[str, list],
    allow_none: bool = False,
) -> list[float]:
    """`call_scores` on this host. With `allow_none`, None is a score that does not count: NaN."""
    name = getattr(function, "__name__", "the score function")
    values = call_function(
        function,
        name,
        (prompts, completions),
        columns,
        nouns=("scores", "completions"),
        expected="a list of numbers, one for each completion",
    )
    return [
        math.nan if value is None and allow_none else _finite_number(name, index, value, completion)
        for index, (value, completion) in enumerate(zip(values, completions, strict=True))
    ]


def call_function(
    function: Callable[..., Any],
    name: str,
    texts: Sequence[Sequence[Any]],
    columns: Mapping[str, Sequence[Any]],
    *,
    nouns: tuple[str, str],
    expected: str,
) -> list[Any]:
    """function(*texts, **columns), a value for each text; the function has lists of its own.

    Args:
      name: of the function, in messages.
      nouns: the names of values and of texts.
      expected: the description of a valid result.

    Raises:
      InputError: the result is not a list of that length, or the function ends the program.
      FunctionError: the function raises something; an InputError of its own is kept.
    """
    count, copies = len(texts[0]), {key: list(values) for key, values in columns.items()}
    try:
        with _warning_of_long_calls(name):
            result = function(*(list(each) for each in texts), **copies)
            # The order of a set is undefined.
            is_list = isinstance(result, Iterable) and not isinstance(
                result, str | bytes | Mapping | Set
            )
            values = list(itertools.islice(result, count + 1)) if is_list else []
    except SystemExit as error:
        raise InputError(f"{name} ends the program by sys.exit({error.code!r}).") from error
    except InputError:  # such as a package that is not installed
        raise
    except Exception as error:
        raise _raised(name, error) from error
    if not is_list:
        raise InputError(f"{name} gave {shown(result)}; it has to give {expected}.")
    if len(values) != count:
        number = f"more than {count}" if len(values) > count else len(values)
        raise InputError(
            f"{name} gave {number} {nouns[0]} for {count} {nouns[1]}; it has to give {expected}."
        )
    return values


def _raised(name: str, error: Exception) -> FunctionError:
    """The sentence about an exception, whose traceback loses the line of `call_function`."""
    own = None if error.__traceback__ is None else error.__traceback__.tb_next
    error.__traceback__ = own
    frames, where = traceback.extract_tb(own), ""
    if frames:  # the innermost line of the function's own file
        file = frames[0].filename
        line = [frame.lineno for frame in frames if frame.filename == file][-1]
        where = f" ({os.path.relpath(file) if os.path.isabs(file) else file}, line {line})"
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:300]
    return FunctionError(f"{name}{where} raised {text.removesuffix('.')}.")


@contextlib.contextmanager
def _warning_of_long_calls(name: str) -> Iterator[None]:
    """Logs a warning where the block does not end within `PATIENCE` seconds."""
    text = "%s has not returned for %g seconds. If it hangs, end the run by Ctrl-C, twice."
    timer = threading.Timer(PATIENCE, _logger.warning, (text, name, PATIENCE))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _finite_number(name: str, index: int, value: Any, completion: Any) -> float:
    try:
        if isinstance(value, (str, bytes)) or np.ndim(value) > 0:
            raise TypeError
        score = float(value)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} gave {shown(value)} at index {index}; it has to give a number for each "
            "completion."
        ) from None
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise NotFiniteError(
            f"{name} gave the score {shown(value)} for the completion {shown(completion)} at "
            f"index {index}; it has to give a finite number."
        )
    return score
