"""Checks of settings name the key, what is allowed, and the value."""

import dataclasses
import math
from typing import Literal

import pytest

from rlhf_jax import checks
from rlhf_jax.errors import InputError


@pytest.mark.parametrize(
    ("check", "allowed", "refused", "message"),
    [
        (checks.positive, (1, 0.5, None), (0, -1.0), "s.x must be above 0, but is"),
        (checks.not_negative, (0, 2.0, None), (-1,), "s.x must not be negative, but is -1"),
        (checks.fraction, (0, 1.0, None), (-0.1, 1.1), "s.x must be from 0 to 1, but is"),
        (checks.below_one, (0.0, 0.9, None), (1.0, -1), "s.x must be at least 0 and below 1, but"),
    ],
)
def test_values_out_of_range_are_named(check, allowed, refused, message):
    for value in allowed:
        check("s", x=value)
    for value in refused:
        with pytest.raises(InputError, match=message):
            check("s", x=value)


@dataclasses.dataclass(frozen=True)
class Fields:
    number: float = 1.0
    optional: float | None = None
    choice: Literal["a", "b"] = "a"
    optional_choice: Literal["a", "b"] | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"number": math.nan}, "s.number must be a finite number, but is nan"),
        ({"optional": -math.inf}, "s.optional must be a finite number, but is -inf"),
        ({"number": None}, "s.number must have a value, but is null"),
        ({"choice": "c"}, "s.choice must be a or b, but is 'c'"),
        ({"choice": None}, "s.choice must be a or b, but is None"),
        ({"optional_choice": "c"}, "s.optional_choice must be a, b or null, but is 'c'"),
    ],
)
def test_values_that_an_annotation_excludes_are_named(values, message):
    checks.fields("s", Fields())
    checks.fields("s", Fields(2, 0.5, "b", "b"))
    with pytest.raises(InputError, match=message):
        checks.fields("s", Fields(**values))


def test_a_minimum_a_list_and_a_divisor_are_named():
    checks.at_least(2, "s", x=2)
    with pytest.raises(InputError, match="s.x must be at least 2, but is 1"):
        checks.at_least(2, "s", x=1)
    checks.one_of(("a", "b", None), "s", x=None)
    with pytest.raises(InputError, match="s.x must be a, b or null, but is 'c'"):
        checks.one_of(("a", "b", None), "s", x="c")
    checks.divides("s", "x", 6, "y", 3)
    with pytest.raises(InputError, match="s.x = 6 is not divisible by s.y = 4; change one of"):
        checks.divides("s", "x", 6, "y", 4)
