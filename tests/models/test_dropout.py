"""Dropout: rates, independence of neighbours, and exact expectations."""

import jax
import numpy as np
import pytest

from rlhf_jax.models.dropout import dropout_mask


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(64, 1001), (200, 320)])
def test_the_rate_is_kept_and_the_factor_makes_up_for_it(rate, shape):
    keep, scale = dropout_mask(jax.random.key(0), shape, rate)
    assert keep.shape == shape
    assert keep.dtype == bool
    share = np.mean(keep)
    deviation = np.sqrt(rate * (1 - rate) / np.prod(shape))
    assert abs(share - (1 - rate)) < 4 * deviation
    assert scale == pytest.approx(1 / (1 - rate), rel=1e-4)


def test_neighbours_from_one_word_are_independent():
    keep = np.asarray(dropout_mask(jax.random.key(1), (1000, 200), 0.3)[0], np.float64)
    first, second = keep[:, ::2].ravel(), keep[:, 1::2].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(first.size)
    assert not np.array_equal(first, second)


def test_another_key_is_another_mask_and_the_same_the_same():
    one, same, other = (
        np.asarray(dropout_mask(jax.random.key(seed), (8, 9), 0.5)[0]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
