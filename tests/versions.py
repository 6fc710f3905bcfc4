"""Parameters that are tested with the newest versions alone."""

import pytest


def newest(*values):
    """The values as parameters marked `newest`; a tuple holds one value for each argument."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.newest)
        for value in values
    ]
