"""Messages between hosts: results and exceptions as JSON, from which no code can run.

Whoever reaches the coordinator's port can send them.
"""

import builtins
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.errors import InputError


def encode(result: Any, error: Exception | None = None) -> bytes:
    """A message that `decode` reads.

    Args:
      result: None, numbers, texts, paths, NumPy arrays of numbers, and lists, tuples and dicts.
      error: its type, or the nearest base that is Python's own or `InputError`, its arguments and
        its notes are sent.

    Raises:
      TypeError: the result holds something else.
    """
    if error is not None:
        return json.dumps({"error": _described(error)}).encode()
    return json.dumps({"result": _plain(result)}).encode()


def decode(message: bytes) -> tuple[Any, Exception | None]:
    """(result, error) of a message; paths are restored as texts, NumPy's scalars as numbers.

    >>> decode(encode({3: (0.5, np.arange(2))}))
    ({3: (0.5, array([0, 1]))}, None)
    """
    data = json.loads(message)
    if "error" in data:
        return None, _exception(**data["error"])
    return _restored(data["result"]), None


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(each) for each in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(key), _plain(each)] for key, each in value.items()]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": value.ravel().tolist(), "dtype": value.dtype.name, "shape": value.shape}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a result for all hosts may not hold a {type(value).__name__}.")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_restored(each) for each in value["tuple"])
    if "dict" in value:
        return {_restored(key): _restored(each) for key, each in value["dict"]}
    return np.asarray(value["array"], value["dtype"]).reshape(value["shape"])


def _described(error: Exception) -> dict[str, Any]:
    known = next(each for each in type(error).__mro__ if each is InputError or _is_builtin(each))
    arguments = list(error.args)
    if isinstance(error, OSError) and error.filename is not None:
        arguments.append(str(error.filename))
    if not all(each is None or isinstance(each, (bool, int, float, str)) for each in arguments):
        known, arguments = RuntimeError, [f"{type(error).__name__}: {error}"]
    notes = [str(note) for note in getattr(error, "__notes__", [])]
    return {"name": known.__name__, "arguments": arguments, "notes": notes}


def _exception(name: str, arguments: list[Any], notes: list[str]) -> Exception:
    kind = InputError if name == InputError.__name__ else getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    try:
        error = kind(*arguments)
    except TypeError:
        error = RuntimeError(f"{name}: {' '.join(map(str, arguments))}")
    for note in notes:
        error.add_note(note)
    return error


def _is_builtin(kind: type) -> bool:
    return getattr(builtins, kind.__name__, None) is kind
