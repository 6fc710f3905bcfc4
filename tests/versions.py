"""Parameters that need no older version."""

import pytest


def newest(*values):
    """Values for `pytest.mark.parametrize` that are tested on the newest end alone."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.newest)
        for value in values
    ]
