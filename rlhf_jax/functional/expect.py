"""Checks of shapes, dtypes and choices: at trace time, with the argument's name in the message."""

import chex
import jax.numpy as jnp


def expect(**arguments):
    """Checks that arrays have the shapes and dtypes that a function takes.

    Args:
      **arguments: `name=(array, axes, kind)`. `axes` has one letter per axis; a letter means the
        size that it had where it came first, and a leading "..." any axes, the same ones in each
        array that has it. `kind` is float, int or bool, of any width.

    Raises:
      ValueError: naming the first argument that does not fit.

    >>> expect(scores=(jnp.zeros(4), "B", float), mask=(jnp.zeros((3, 2), bool), "BT", bool))
    Traceback (most recent call last):
    ...
    ValueError: mask must be bool[B, T] with B = 4, but is bool[3, 2].
    """
    sizes: dict = {}
    for name, (array, axes, kind) in arguments.items():
        letters = axes.removeprefix("...")
        leading = sizes.get("...", (...,)) if axes.startswith("...") else ()
        try:
            chex.assert_shape(array, (*leading, *(sizes.get(letter) for letter in letters)))
            chex.assert_type(array, kind)
        except (AssertionError, AttributeError, TypeError):
            raise ValueError(_message(name, array, axes, kind, sizes)) from None
        split = len(array.shape) - len(letters)
        if axes.startswith("..."):
            sizes["..."] = array.shape[:split]
        sizes |= dict(zip(letters, array.shape[split:], strict=True))


def expect_one_of(**arguments):
    """Checks that `name=(value, choices)` is one of the choices.

    Raises:
      ValueError: naming the argument and what is allowed.

    >>> expect_one_of(kind=("k4", ("k1", "k2", "k3")))
    Traceback (most recent call last):
    ...
    ValueError: kind must be one of 'k1', 'k2', 'k3', but is 'k4'.
    """
    for name, (value, choices) in arguments.items():
        if value not in choices:
            allowed = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{name} must be one of {allowed}, but is {value!r}.")


def _message(name, array, axes, kind, sizes):
    letters = axes.removeprefix("...")
    wanted = ", ".join((["..."] if axes.startswith("...") else []) + list(letters))
    bound = [f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes]
    if axes.startswith("...") and "..." in sizes:
        bound.insert(0, f"... = {list(sizes['...'])}")
    where = f" with {', '.join(bound)}" if bound else ""
    if hasattr(array, "shape") and hasattr(array, "dtype"):
        given = f"{jnp.dtype(array.dtype).name}{list(array.shape)}"
    else:
        given = f"{array!r:.40} (no array)"
    return f"{name} must be {kind.__name__}[{wanted}]{where}, but is {given}."
