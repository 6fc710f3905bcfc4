"""Limits of settings: each check names the key, what is allowed and what was given.

The keyword arguments are the values of keys of one section. None, a value that is not set, passes
every check but `one_of`.

>>> positive("sft", batch_size=16, num_epochs=0.5)
>>> positive("sft", batch_size=0)
Traceback (most recent call last):
rlhf_jax.errors.InputError: sft.batch_size must be above 0, but is 0.
"""

import math
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rlhf_jax.errors import InputError


def positive(section: str, **values: float | None) -> None:
    """Raises an InputError for a value that is not above 0."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise InputError(f"{section}.{name} must be above 0, but is {value}.")


def not_negative(section: str, **values: float | None) -> None:
    """Raises an InputError for a value below 0."""
    for name, value in values.items():
        if value is not None and value < 0:
            raise InputError(f"{section}.{name} must not be negative, but is {value}.")


def at_least(minimum: float, section: str, **values: float | None) -> None:
    """Raises an InputError for a value below the minimum."""
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


def fields(section: str, settings: Any) -> None:
    """Raises an InputError for a field of a dataclass that its annotation excludes.

    That is null without a None in the annotation, a float that is infinite or NaN, and a value that
    is not among those of a `Literal`.
    """
    for name, annotation in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        is_union = get_origin(annotation) in (Union, types.UnionType)
        kinds = get_args(annotation) if is_union else (annotation,)
        nulls = [None] if type(None) in kinds else []
        choices = [each for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
        if choices:
            one_of(choices + nulls, section, **{name: value})
        elif value is None and not nulls:
            raise InputError(f"{section}.{name} must have a value, but is null.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{section}.{name} must be a finite number, but is {value}.")


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
