"""Means, variances, whitening and response masks against NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlhf_jax as rlhf
from rlhf_jax import functional
from rlhf_jax.functional.masking import batch_mean


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1)])
@pytest.mark.parametrize("unbiased", [True, False])
def test_mean_and_variance_are_numpys_over_the_real_entries(rng, ragged_mask, axis, unbiased):
    x = rng.normal(3.0, 2.0, size=ragged_mask.shape).astype(np.float32)
    mean = rlhf.masked_mean(x, ragged_mask, axis)
    var = rlhf.masked_var(x, ragged_mask, axis, unbiased=unbiased)
    masked = np.ma.array(x.astype(np.float64), mask=~ragged_mask)
    ddof = 1 if unbiased else 0
    np.testing.assert_allclose(mean, np.ma.filled(masked.mean(axis), 0.0), rtol=1e-5)
    expected = np.ma.filled(masked.var(axis, ddof=ddof), 0.0)
    np.testing.assert_allclose(var, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("unbiased", [True, False])
def test_whitened_entries_have_variance_one(rng, ragged_mask, unbiased):
    x = rng.normal(3.0, 2.0, size=ragged_mask.shape).astype(np.float32)
    real = x[ragged_mask].astype(np.float64)
    expected = (real - real.mean()) / np.sqrt(real.var(ddof=int(unbiased)) + 1e-8)
    whitened = rlhf.masked_whiten(x, ragged_mask, unbiased=unbiased)
    kept = rlhf.masked_whiten(x, ragged_mask, shift_mean=False, unbiased=unbiased)
    np.testing.assert_allclose(whitened[ragged_mask], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kept[ragged_mask], expected + real.mean(), rtol=1e-4, atol=1e-6)
    assert not np.any(whitened[~ragged_mask])
    assert not np.any(kept[~ragged_mask])


def test_whitening_of_equal_entries_is_finite():
    x, mask = np.full((2, 3), 0.1, np.float32), np.ones((2, 3), bool)
    grad = jax.grad(lambda x: rlhf.masked_whiten(x, mask)[0, 0])(x)
    np.testing.assert_allclose(rlhf.masked_whiten(x, mask), np.zeros((2, 3)), atol=1e-3)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("value", [0.1, 100.3, 4321.1, 9999.9, -1e6 / 3])
def test_equal_entries_have_no_variance_and_are_whitened_to_zero(ragged_mask, value):
    """The rounding of their mean is no deviation, whatever the mean."""
    x = np.where(ragged_mask, np.float32(value), np.nan)
    np.testing.assert_allclose(rlhf.masked_whiten(x, ragged_mask), 0, atol=1e-5)
    kept = rlhf.masked_whiten(x, ragged_mask, shift_mean=False)
    np.testing.assert_allclose(kept[ragged_mask], np.float32(value), rtol=1e-6)
    for axis in (None, 0, 1):
        assert np.all(rlhf.masked_var(x, ragged_mask, axis) <= 1e-16 * value**2)


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=1))
def test_a_response_ends_with_its_first_stop_token(examples):
    mask = rlhf.response_mask(np.array(examples, np.int32), (0, 3))
    for tokens, real in zip(examples, np.asarray(mask), strict=True):
        stops = [t for t, token in enumerate(tokens) if token in (0, 3)]
        length = stops[0] + 1 if stops else len(tokens)
        assert real.tolist() == [True] * length + [False] * (len(tokens) - length)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32])
def test_stop_tokens_are_counted_whatever_the_tokens_are(dtype):
    tokens = np.zeros((1, 70_000), dtype)
    tokens[0, :2] = 5
    mask = np.asarray(rlhf.response_mask(tokens, (0,)))
    np.testing.assert_array_equal(np.nonzero(mask[0])[0], [0, 1, 2])


@pytest.mark.parametrize("given", [0, [0], (0.5,), "0"])
def test_stop_tokens_that_are_no_tuple_of_whole_numbers_are_named(given):
    with pytest.raises(ValueError, match="^stop_token_ids must be a tuple of whole numbers, but "):
        functional.response_mask(np.zeros((1, 2), int), given)


def test_without_stop_tokens_everything_is_real():
    assert np.all(rlhf.response_mask(np.zeros((2, 3), np.int32), ()))


def test_batch_mean_counts_what_is_real_and_divides_by_what_it_is_given():
    x, mask = np.array([1.0, 2.0, np.nan], np.float32), np.array([True, True, False])
    assert batch_mean(x, mask) == 1.5
    assert batch_mean(x, mask, 4) == 0.75


@pytest.mark.parametrize("function", [functional.masked_var, functional.masked_whiten])
def test_what_is_no_array_is_named(function):
    with pytest.raises(ValueError, match="^x must be "):
        function([1.0, 2.0], [True, True])
