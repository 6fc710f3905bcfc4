"""Checks of settings name the key, what is allowed, and the value."""

import math

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
        (checks.finite, (1.0, "a", None), (math.nan, -math.inf), "s.x must be a finite number"),
    ],
)
def test_values_out_of_range_are_named(check, allowed, refused, message):
    for value in allowed:
        check("s", x=value)
    for value in refused:
        with pytest.raises(InputError, match=message):
            check("s", x=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_limit_passes_what_is_not_finite(value):
    for check in (checks.positive, checks.not_negative, checks.fraction, checks.below_one):
        with pytest.raises(InputError, match=r"^s\.x must be "):
            check("s", x=value)
    with pytest.raises(InputError, match=r"^s\.x must be a finite number"):
        checks.at_least(2, "s", x=value)


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
