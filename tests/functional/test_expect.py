"""Messages of the checks of shapes and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.functional.expect import expect, expect_one_of, expect_scalars

X = np.zeros((2, 3), np.float32)


def message(**arguments):
    with pytest.raises(ValueError) as caught:
        expect(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_matching_arrays_pass_and_the_first_of_another_size_is_named(dtype):
    x, tokens = jnp.zeros((2, 3), dtype), jnp.zeros((2, 3), jnp.int32)
    arrays = {"x": (x, "BT", float), "tokens": (tokens, "BT", int), "mask": (x > 0, "BT", bool)}
    assert message(**arrays, scores=(x[0], "B", float)).startswith("scores must be float[B] with")
    arrays = {"logits": (x, "...V", float), "tokens": (tokens[:, 0], "...", int)}
    assert message(**arrays, mask=(x > 0, "...", bool)).startswith("mask must be bool[...] with")
    arrays = {"logits": (x[0], "...V", float), "token": (tokens[0, 0], "...", int)}
    assert message(**arrays, mask=(x > 0, "...", bool)).startswith("mask must be bool[...] with")


def test_the_message_says_what_is_expected_and_what_was_given():
    assert message(x=(X, "BT", float), y=(X[:, :2], "BT", float)) == (
        "y must be float[B, T] with B = 2, T = 3, but is float32[2, 2]."
    )
    assert message(x=(X, "BTV", float)) == "x must be float[B, T, V], but is float32[2, 3]."
    assert message(x=(X, "BT", int)) == "x must be int[B, T], but is float32[2, 3]."
    assert message(x=(X, "BT", bool)) == "x must be bool[B, T], but is float32[2, 3]."
    assert message(mask=(X > 0, "BT", float)) == "mask must be float[B, T], but is bool[2, 3]."
    assert message(x=(X, "...V", float), y=(X, "...", float)) == (
        "y must be float[...] with ... = [2], but is float32[2, 3]."
    )


@pytest.mark.parametrize("axes", ["B", "...", ""])
@pytest.mark.parametrize("value", [None, 0.5, "text"])
def test_another_value_than_an_array_is_named(value, axes):
    assert message(scores=(value, axes, float)) == (
        f"scores must be float[{axes}], but is {value!r} (no array)."
    )


def test_lists_are_named_as_such_whatever_they_hold():
    assert message(scores=([1.0, 2.0], "B", float)) == "scores must be float[B], but is a list."


@pytest.mark.parametrize("value", [1, 0.5, np.float32(2), np.int64(3), np.ones(()), None])
def test_single_numbers_pass_and_the_first_other_value_is_named(value):
    def check(x):
        expect_scalars(denominator=x, coef=[x])

    for function in (check, jax.jit(check)):
        with pytest.raises(ValueError, match="^coef must be a single number, but is a list"):
            function(value)


@pytest.mark.parametrize(
    ("value", "name"),
    [(np.ones(3, np.float32), r"float32\[3\]"), ([1.0], "a list"), ("1", r"'1' \(no array\)")],
)
def test_what_is_no_single_number_is_named(value, name):
    with pytest.raises(ValueError, match=f"^denominator must be a single number, but is {name}.$"):
        expect_scalars(kl_coef=1.0, denominator=value)


def test_the_check_happens_when_tracing():
    with pytest.raises(ValueError, match="^x must be int"):
        jax.eval_shape(lambda x: expect(x=(x, "B", int)), X[0])


def test_choices():
    expect_one_of(kind=("a", ("a", "b")))
    with pytest.raises(ValueError, match="^kind must be one of 'a', 'b', but is 'c'.$"):
        expect_one_of(kind=("c", ("a", "b")))
