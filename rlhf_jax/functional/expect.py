"""Checks of shapes, dtypes and choices: at trace time, with the argument's name in the message."""

import numbers

import chex
import jax.numpy as jnp


def expect(**arguments):
    """Checks the shapes and dtypes of arrays.

    Args:
      **arguments: `name=(array, axes, kind)`. `axes` has one letter per axis; the first use of a
        letter binds its size. A leading "..." stands for any axes, the same for all arrays that
        have it. `kind` is float, int or bool, of any width.

    Raises:
      ValueError: naming the first argument that does not match.

    >>> expect(scores=(jnp.zeros(4), "B", float), mask=(jnp.zeros((3, 2), bool), "BT", bool))
    Traceback (most recent call last):
    ...
    ValueError: mask must be bool[B, T] with B = 4, but is bool[3, 2].
    """
    sizes: dict = {}
    for name, (array, axes, kind) in arguments.items():
        letters = axes.removeprefix("...")
        leading = sizes.get("...", (...,)) if axes.startswith("...") else ()
        if not _is_array(array):
            raise ValueError(_message(name, array, axes, kind, sizes))
        try:
            chex.assert_shape(array, (*leading, *(sizes.get(letter) for letter in letters)))
            chex.assert_type(array, kind)
        except AssertionError:
            raise ValueError(_message(name, array, axes, kind, sizes)) from None
        split = len(array.shape) - len(letters)
        if axes.startswith("..."):
            sizes["..."] = array.shape[:split]
        sizes |= dict(zip(letters, array.shape[split:], strict=True))


def expect_one_of(**arguments):
    """Checks that `name=(value, choices)` is one of the choices.

    Raises:
      ValueError: naming the argument and the allowed values.

    >>> expect_one_of(kind=("k4", ("k1", "k2", "k3")))
    Traceback (most recent call last):
    ...
    ValueError: kind must be one of 'k1', 'k2', 'k3', but is 'k4'.
    """
    for name, (value, choices) in arguments.items():
        if value not in choices:
            allowed = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{name} must be one of {allowed}, but is {value!r}.")


def expect_scalars(**arguments):
    """Checks that coefficients and counts are single numbers.

    Args:
      **arguments: numbers, arrays without axes, or None, which is skipped.

    Raises:
      ValueError: naming the first argument that is none of these.

    >>> expect_scalars(kl_coef=0.1, denominator=jnp.ones(3))
    Traceback (most recent call last):
    ...
    ValueError: denominator must be a single number, but is float32[3].
    """
    for name, value in arguments.items():
        is_scalar = _is_array(value) and value.shape == ()
        if not (value is None or is_scalar or isinstance(value, numbers.Real)):
            raise ValueError(f"{name} must be a single number, but is {_description(value)}.")


def expect_positive(**arguments):
    """Checks, as `expect_scalars` does, and that numbers that are not traced are above 0.

    >>> expect_positive(cap=0.0)
    Traceback (most recent call last):
    ...
    ValueError: cap must be above 0, but is 0.0.
    """
    expect_scalars(**arguments)
    for name, value in arguments.items():
        if isinstance(value, numbers.Real) and value <= 0:
            raise ValueError(f"{name} must be above 0, but is {value}.")


def _is_array(value):
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _description(value):
    if _is_array(value):
        return f"{jnp.dtype(value.dtype).name}{list(value.shape)}"
    # The entries of a list may be tracers, whose text is of no use.
    is_container = isinstance(value, list | tuple | dict)
    return f"a {type(value).__name__}" if is_container else f"{value!r:.40} (no array)"


def _message(name, array, axes, kind, sizes):
    letters = axes.removeprefix("...")
    expected = ", ".join((["..."] if axes.startswith("...") else []) + list(letters))
    bound = [f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes]
    if axes.startswith("...") and "..." in sizes:
        bound.insert(0, f"... = {list(sizes['...'])}")
    where = f" with {', '.join(bound)}" if bound else ""
    return f"{name} must be {kind.__name__}[{expected}]{where}, but is {_description(array)}."
