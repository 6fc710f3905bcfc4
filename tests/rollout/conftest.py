"""A tiny model with sharp preferences, and ragged prompts."""

import numpy as np
import pytest

from tests.models.tiny_gpt2 import MODEL, busy_params


@pytest.fixture(scope="session")
def model():
    return MODEL


@pytest.fixture(scope="session")
def params(model):
    return busy_params(model, 0, deviation=0.4)


@pytest.fixture(scope="session")
def prompts():
    """(tokens i32[4, 5], mask bool[4, 5]): left-padded with ids that mean nothing."""
    rng = np.random.default_rng(1)
    lengths = (5, 1, 3, 4)
    mask = np.array([[t >= 5 - length for t in range(5)] for length in lengths])
    tokens = np.where(mask, rng.integers(0, 11, size=mask.shape), 7).astype(np.int32)
    return tokens, mask
