"""Parameters of the tiny GPT-2, and texts of its vocabulary."""

import numpy as np
import pytest

from tests.models.tiny_gpt2 import MODEL, VOCABULARY, busy_params


@pytest.fixture(scope="session")
def params():
    return busy_params(MODEL)


@pytest.fixture(scope="session")
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, size=n) for n in (5, 1, 3, 7)]
