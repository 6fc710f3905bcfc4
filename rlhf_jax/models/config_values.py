"""Checks of the values of a config.json, in sentences that name the key and the value."""

import sys
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import InputError

LARGEST_SIZE = 2**31 - 1


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise InputError(f"{name} must be a number above 0, but is {value!r}.")
    return float(value)


def integer(name: str, value: Any, lowest: int = 1, highest: int = LARGEST_SIZE) -> int:
    """An integer of a range."""
    if type(value) is not int or not lowest <= value <= highest:
        raise InputError(f"{name} must be an integer from {lowest} to {highest}, but is {value!r}.")
    return value


def is_true(data: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """The value of a key that is true or false."""
    value = data.get(key, default)
    if type(value) is not bool:
        raise InputError(f"{key} must be true or false, but is {value!r}.")
    return value
