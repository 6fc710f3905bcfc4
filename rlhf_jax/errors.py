"""Exceptions for mistakes that a user can mend; their messages are one sentence."""

from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """A file, an example, a setting or a command line that cannot be used.

    The message names the value, the allowed ones and the remedy. The commands print it as one line
    and exit with status 2; Python callers catch it as a `ValueError`.
    """


class FunctionError(InputError):
    """A function of the user, such as a reward, raised an exception, which is the cause of this.

    The commands print the cause with its traceback, in which only the lines of the function are,
    before the sentence.
    """

    def add_progress(self, step: int, kept: int | None) -> None:
        """Appends the number of steps taken, and the newest checkpoint or None, to the sentence."""
        remedy = "mend it and start again"
        if kept:
            remedy = f"step {kept} is saved, and the same command continues from there"
        sentence = str(self).removesuffix(".")
        self.args = (f"{sentence}, after {step} steps; {remedy}.",)


def shown(value: Any, text_of: Callable[[Any], str] = repr) -> str:
    """A value in a message: its beginning, in one line."""
    try:
        text = " ".join(text_of(value).split())
    except (ValueError, RecursionError):  # an int of more than 4300 digits, or deep nesting
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 100 else f"{text[:100]}..."
