"""Limits of settings, stated in the annotations of a dataclass: `batch_size: PositiveInt = 16`."""

import dataclasses
import math
import numbers
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from rlhf_jax.errors import InputError


class Limit(NamedTuple):
    """A condition on a number, and its text after "must"."""

    holds: Callable[[Any], bool]
    text: str


_POSITIVE = Limit(lambda x: x > 0, "be above 0")
_NOT_NEGATIVE = Limit(lambda x: x >= 0, "not be negative")
PositiveInt = Annotated[int, _POSITIVE]
PositiveFloat = Annotated[float, _POSITIVE]
NonNegativeInt = Annotated[int, _NOT_NEGATIVE]
NonNegativeFloat = Annotated[float, _NOT_NEGATIVE]
Fraction = Annotated[float, Limit(lambda x: 0 <= x <= 1, "be from 0 to 1")]
PositiveFraction = Annotated[float, Limit(lambda x: 0 < x <= 1, "be above 0 and at most 1")]
TwoOrMore = Annotated[int, Limit(lambda x: x >= 2, "be at least 2")]
FractionBelowOne = Annotated[float, Limit(lambda x: 0 <= x < 1, "be at least 0 and below 1")]


def check_fields(section: str, settings: Any) -> None:
    """Raises an InputError for a field of a dataclass whose value its annotation excludes.

    Its key in the message is section.name, or the name alone with the section "".

    That is null without a None in the annotation, a value that is not among those of a `Literal`, a
    float that is infinite or NaN, a float or a bool for an `int`, a bool for a `float`, and a
    number outside of a `Limit`.

    >>> import dataclasses
    >>> Settings = dataclasses.make_dataclass("Settings", [("batch_size", PositiveInt)])
    >>> check_fields("sft", Settings(batch_size=16))
    >>> check_fields("sft", Settings(batch_size=0))
    Traceback (most recent call last):
    rlhf_jax.errors.InputError: sft.batch_size must be above 0, but is 0.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for name in (field.name for field in dataclasses.fields(settings)):
        annotation = hints[name]
        is_union = get_origin(annotation) in (Union, types.UnionType)
        kinds = get_args(annotation) if is_union else (annotation,)
        _check_field(f"{section}.{name}".removeprefix("."), getattr(settings, name), kinds)


def _check_field(key: str, value: Any, kinds: tuple[Any, ...]) -> None:
    has_null = type(None) in kinds
    choices = [each for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
    if choices and value not in choices + [None] * has_null:
        *first, last = [*choices, "null"] if has_null else choices
        raise InputError(f"{key} must be {', '.join(first)} or {last}, but is {value!r}.")
    if value is None:
        if not has_null:
            raise InputError(f"{key} must have a value, but is null.")
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key} must be a finite number, but is {value}.")
    bases = {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds}
    if isinstance(value, float) and int in bases and float not in bases:
        raise InputError(f"{key} must be an integer, but is {value!r}.")
    if isinstance(value, bool) and bool not in bases and bases & {int, float}:
        number = "an integer" if int in bases else "a number"
        raise InputError(f"{key} must be {number}, but is {value!r}.")
    for limit in [each for kind in kinds for each in getattr(kind, "__metadata__", ())]:
        if not isinstance(value, numbers.Real) or not limit.holds(value):
            raise InputError(f"{key} must {limit.text}, but is {value!r}.")


def check_divides(settings: Any, name: str, divisor_name: str, value: int | None = None) -> None:
    """Raises an InputError unless the value is a multiple of the divisor, a field or None.

    Args:
      settings: with the name of its `section`.
      name: of the value, by default a field too.
    """
    divisor, section = getattr(settings, divisor_name), settings.section
    value = getattr(settings, name) if value is None else value
    if divisor is not None and value % divisor:
        raise InputError(
            f"{section}.{name} = {value} is not divisible by {section}.{divisor_name} = {divisor}; "
            "change one of them."
        )


def check_effect(settings: Any, names: Sequence[str], condition: str) -> None:
    """Raises an InputError for a field of those named that is not its default.

    Args:
      settings: with the name of its `section`.
      condition: with which alone these fields have an effect, for the message.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        changed = (tuple(value) if isinstance(value, list) else value) != field.default
        if changed and field.name in names:
            raise InputError(
                f"{settings.section}.{field.name} is {value}, but has an effect with {condition} "
                "only; leave it out, or set that."
            )
