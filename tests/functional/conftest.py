"""Fixtures of the tests of the functions."""

from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def ragged_mask():
    """bool[5, 7] with examples of 7, 1, 4, 0 and 6 real positions."""
    return np.arange(7) < np.array([7, 1, 4, 0, 6])[:, None]


@pytest.fixture(scope="session")
def golden():
    """A function from the name of a golden file to its arrays, as {prefix: {name: array}}."""
    files = {}

    def load(name):
        if name not in files:
            cases = {}
            with np.load(GOLDEN / f"{name}.npz") as arrays:
                for key in arrays.files:
                    prefix, _, rest = key.partition("/")
                    cases.setdefault(prefix, {})[rest] = arrays[key]
            files[name] = cases
        return files[name]

    return load
