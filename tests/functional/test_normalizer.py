"""Normalizers and entropies of logits, summed in blocks on a CPU or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rlhf
from rlhf_jax.functional.normalizer import BLOCK, entropy_of, normalizer

LEAST = np.finfo(np.float32).min
# One block, three, and logits that are no multiple of a block.
SIZES = (9, BLOCK, 3 * BLOCK)


def by_loop(logits):
    """(log Z, entropy) of each row, in float64."""
    actual = []
    for row in np.asarray(logits, np.float64).reshape(-1, logits.shape[-1]):
        top = max(row)
        total = sum(np.exp(x - top) for x in row)
        mean = sum(np.exp(x - top) * (x - top) for x in row if np.isfinite(x)) / total
        actual.append((top + np.log(total), np.log(total) - mean))
    return np.array(actual).reshape(*logits.shape[:-1], 2).T


def make_logits(size, scale=1.0):
    """Four distributions; the second is impossible beyond its first block, the third within it."""
    logits = scale * np.random.default_rng(size).normal(size=(4, size))
    logits[1, min(BLOCK, size // 2) :] = -np.inf
    logits[2, : min(BLOCK, size) - 1] = -np.inf
    return logits.astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_equal_a_loop(size, scale):
    logits = make_logits(size, scale)
    total, entropy = by_loop(logits)
    top, log_total = normalizer(logits)
    np.testing.assert_allclose(top + log_total, total.T, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(entropy_of(logits), entropy.T, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [LEAST, -2e30, -1e5, 1e5, 3e38])
def test_equal_logits_are_uniform(size, offset):
    logits = np.full((2, size), offset, np.float32)
    np.testing.assert_allclose(normalizer(logits)[1], np.log(size), rtol=1e-6)
    np.testing.assert_allclose(rlhf.token_entropy(logits), np.log(size), rtol=1e-6)
    expected = np.full(2, -np.log(size))
    np.testing.assert_allclose(rlhf.token_logprobs(logits, np.zeros(2, int)), expected, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, "all -inf"])
def test_no_distribution_is_nan_with_a_gradient_of_zero_and_changes_no_other(size, garbage):
    logits = make_logits(size)
    logits[3] = -np.inf if garbage == "all -inf" else logits[3]
    logits[3, -1] = -np.inf if garbage == "all -inf" else garbage
    tokens = np.argmax(logits[:, :size], axis=-1)
    for function in (rlhf.token_entropy, lambda x: rlhf.token_logprobs(x, tokens)):
        values = function(logits)
        assert np.isnan(values[3])
        np.testing.assert_array_equal(values[:3], np.asarray(function(make_logits(size)))[:3])
        grads = np.asarray(jax.grad(lambda x, f=function: jnp.sum(f(x)[:3]))(logits))
        assert np.isfinite(grads).all()
        assert not grads[3].any()


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_probabilities(size):
    logits = make_logits(size)
    probabilities = np.exp(logits - by_loop(logits)[0].T[:, None])
    entropy = by_loop(logits)[1].T[:, None]
    logp = np.log(np.where(probabilities > 0, probabilities, 1.0))
    actual = jax.grad(lambda x: jnp.sum(rlhf.token_entropy(x)))(logits)
    np.testing.assert_allclose(actual, -probabilities * (logp + entropy), rtol=1e-4, atol=1e-6)
    tokens = np.nanargmax(logits, axis=-1)
    actual = jax.grad(lambda x: jnp.sum(rlhf.token_logprobs(x, tokens)))(logits)
    np.testing.assert_allclose(actual, np.eye(size)[tokens] - probabilities, rtol=1e-4, atol=1e-6)
