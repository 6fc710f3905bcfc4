"""The one exception for what a user can mend; its message is shown without a traceback."""


class InputError(ValueError):
    """A file, a row, a setting or a command line that cannot be used.

    The message says what was given, what is allowed and what to do. The commands print it as one
    line and exit with status 2; Python callers catch it as a `ValueError`.
    """
