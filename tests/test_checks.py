"""Checks of settings name the key, what is allowed, and the value."""

import dataclasses
import math
import types
from typing import Literal, get_args, get_type_hints

import pytest

from rlhf_jax import checks
from rlhf_jax.errors import InputError
from rlhf_jax.rollout.settings import GenerationSettings
from rlhf_jax.training import ppo_settings, reward_settings, sft_settings
from rlhf_jax.training.settings import OptimizerSettings


@dataclasses.dataclass(frozen=True)
class Fields:
    number: float = 1.0
    optional: float | None = None
    choice: Literal["a", "b"] = "a"
    optional_choice: Literal["a", "b"] | None = None
    positive: checks.PositiveInt = 1
    optional_positive: checks.PositiveFloat | None = None
    not_negative: checks.NonNegativeFloat = 0.0
    fraction: checks.Fraction = 1.0
    positive_fraction: checks.PositiveFraction = 1.0
    below_one: checks.FractionBelowOne = 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"number": math.nan}, "s.number must be a finite number, but is nan"),
        ({"optional": -math.inf}, "s.optional must be a finite number, but is -inf"),
        ({"not_negative": math.nan}, "s.not_negative must be a finite number, but is nan"),
        ({"number": None}, "s.number must have a value, but is null"),
        ({"choice": "c"}, "s.choice must be a or b, but is 'c'"),
        ({"choice": None}, "s.choice must be a or b, but is None"),
        ({"optional_choice": "c"}, "s.optional_choice must be a, b or null, but is 'c'"),
        ({"number": True}, "s.number must be a number, but is True"),
        ({"positive": 2.0}, "s.positive must be an integer, but is 2.0"),
        ({"positive": True}, "s.positive must be an integer, but is True"),
        ({"positive": 0}, "s.positive must be above 0, but is 0"),
        ({"positive": "1"}, "s.positive must be above 0, but is '1'"),
        ({"optional_positive": -1.0}, "s.optional_positive must be above 0, but is -1.0"),
        ({"not_negative": -1}, "s.not_negative must not be negative, but is -1"),
        ({"fraction": 1.1}, "s.fraction must be from 0 to 1, but is 1.1"),
        ({"positive_fraction": 0}, "s.positive_fraction must be above 0 and at most 1, but is 0"),
        ({"below_one": 1.0}, "s.below_one must be at least 0 and below 1, but is 1.0"),
    ],
)
def test_values_that_an_annotation_excludes_are_named(values, message):
    checks.check_fields("s", Fields())
    checks.check_fields("s", Fields(2, 0.5, "b", "b", 3, 0.5, 2, 0.0, 0.5, 0.9))
    with pytest.raises(InputError) as error:
        checks.check_fields("s", Fields(**values))
    assert str(error.value) == f"{message}."


def test_a_divisor_is_named():
    settings = types.SimpleNamespace(section="s", x=6, y=3, z=4, unset=None)
    checks.check_divides(settings, "x", "y")
    checks.check_divides(settings, "x", "unset")
    checks.check_divides(settings, "x / 2", "y", 3)
    with pytest.raises(InputError, match="s.x = 6 is not divisible by s.z = 4; change one of"):
        checks.check_divides(settings, "x", "z")
    with pytest.raises(InputError, match="s.x / 2 = 2 is not divisible by s.y = 3; change one of"):
        checks.check_divides(settings, "x / 2", "y", 2)


SETTINGS = (
    GenerationSettings,
    OptimizerSettings,
    sft_settings.Settings,
    reward_settings.Settings,
    ppo_settings.Settings,
)
FIELDS = [(kind, name) for kind in SETTINGS for name in get_type_hints(kind)]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_no_setting_is_nan_and_none_is_null_but_where_its_type_says_so(kind, name):
    allowed = {*get_args(get_type_hints(kind)[name]), get_type_hints(kind)[name]}
    for value in (math.nan, None):
        if value is None and type(None) in allowed:
            kind(**{name: value})
        else:
            with pytest.raises(InputError, match=rf"\.{name} must "):
                kind(**{name: value})
