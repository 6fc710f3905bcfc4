"""Limits of settings: each check names the key, what is allowed and what was given.

The keyword arguments are the values of keys of one section. None, a value that is not set, passes
every check but `one_of`.

>>> positive("sft", batch_size=16, num_epochs=0.5)
>>> positive("sft", batch_size=0)
Traceback (most recent call last):
rlhf_jax.errors.InputError: sft.batch_size must be above 0, but is 0.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rlhf_jax.errors import InputError


def positive(section: str, **values: float | None) -> None:
    """Raises an InputError for a value that is not above 0, or not finite."""
    finite(section, **values)
    for name, value in values.items():
        if value is not None and value <= 0:
            raise InputError(f"{section}.{name} must be above 0, but is {value}.")


def not_negative(section: str, **values: float | None) -> None:
    """Raises an InputError for a value below 0, or not finite."""
    finite(section, **values)
    for name, value in values.items():
        if value is not None and value < 0:
            raise InputError(f"{section}.{name} must not be negative, but is {value}.")


def at_least(minimum: float, section: str, **values: float | None) -> None:
    """Raises an InputError for a value below the minimum, or not finite."""
    finite(section, **values)
    for name, value in values.items():
        if value is not None and value < minimum:
            raise InputError(f"{section}.{name} must be at least {minimum}, but is {value}.")


def fraction(section: str, **values: float | None) -> None:
    """Raises an InputError for a value outside of [0, 1]."""
    for name, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"{section}.{name} must be from 0 to 1, but is {value}.")


def below_one(section: str, **values: float | None) -> None:
    """Raises an InputError for a value outside of [0, 1)."""
    for name, value in values.items():
        if value is not None and not 0 <= value < 1:
            raise InputError(f"{section}.{name} must be at least 0 and below 1, but is {value}.")


def finite(section: str, **values: Any) -> None:
    """Raises an InputError for a float that is infinite or NaN."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{section}.{name} must be a finite number, but is {value}.")


def all_finite(settings: Any, prefix: str = "") -> None:
    """Raises an InputError for a float in a configuration, at any depth, that is not finite."""
    for name, value in vars(settings).items():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise InputError(f"{prefix}{name} must be a finite number, but is {each}.")
            if dataclasses.is_dataclass(each):
                all_finite(each, f"{prefix}{name}.")


def one_of(allowed: Sequence[Any], section: str, **values: Any) -> None:
    """Raises an InputError for a value that is not among the allowed ones.

    >>> one_of(("k1", "k2", None), "ppo", kl_estimator="k4")
    Traceback (most recent call last):
    rlhf_jax.errors.InputError: ppo.kl_estimator must be k1, k2 or null, but is 'k4'.
    """
    *first, last = ("null" if each is None else str(each) for each in allowed)
    for name, value in values.items():
        if value not in allowed:
            raise InputError(
                f"{section}.{name} must be {', '.join(first)} or {last}, but is {value!r}."
            )


def divides(section: str, name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raises an InputError unless the value is a multiple of the divisor, both positive."""
    if value % divisor:
        raise InputError(
            f"{section}.{name} = {value} is not divisible by {section}.{divisor_name} = {divisor}; "
            "change one of them."
        )
