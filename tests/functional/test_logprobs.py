"""Log-probabilities and entropies against NumPy, and at extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rlhf


def logprobs_by_loop(logits):
    logits = np.asarray(logits, np.float64)
    out = np.empty(logits.shape)
    for index in np.ndindex(logits.shape[:-1]):
        row = logits[index]
        out[index] = row - row.max() - np.log(np.exp(row - row.max()).sum())
    return out


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_logprobs_and_entropy_match_a_loop(rng, scale):
    logits = (scale * rng.normal(size=(3, 4, 9))).astype(np.float32)
    logits[0, 0, 3:] = -np.inf
    tokens = np.argmax(logits, axis=-1) if scale > 1 else rng.integers(0, 3, size=(3, 4))
    expected = logprobs_by_loop(logits)
    p = np.exp(expected)
    entropy = -np.sum(p * np.where(p > 0, expected, 0.0), axis=-1)
    chosen = np.take_along_axis(expected, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(rlhf.token_logprobs(logits, tokens), chosen, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rlhf.token_entropy(logits), entropy, rtol=1e-5, atol=1e-6)


def test_large_logits_keep_their_digits():
    logits = np.array([1e5, 1e5 - 1.0, -np.inf], np.float32)
    expected = -np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(rlhf.token_logprobs(logits, np.array(0)), expected, rtol=1e-6)


@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min, -1e4])
def test_gradients_with_impossible_tokens_are_those_without_them(rng, low):
    logits = rng.normal(size=5).astype(np.float32)
    padded = np.concatenate([logits, np.full(3, low, np.float32)])
    for function in (
        rlhf.token_entropy,
        lambda x: rlhf.token_logprobs(x, jnp.int32(2)),
    ):
        np.testing.assert_allclose(function(padded), function(logits), rtol=1e-6)
        grad = jax.grad(function)(padded)
        np.testing.assert_allclose(grad[:5], jax.grad(function)(logits), rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(grad[5:], 0.0)


def test_a_token_of_probability_zero_has_a_finite_gradient():
    logits = np.array([0.0, 0.0, -np.inf], np.float32)
    value, grad = jax.value_and_grad(rlhf.token_logprobs)(logits, np.array(2))
    assert value == -np.inf
    np.testing.assert_allclose(grad, [-0.5, -0.5, 1.0])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
@pytest.mark.parametrize("vocabulary", [256, 300, 50257])
def test_tokens_may_be_integers_of_any_width(rng, dtype, vocabulary):
    logits = rng.normal(size=(2, 3, vocabulary)).astype(np.float32)
    tokens, mask = np.full((2, 3), 100, dtype), np.ones((2, 3), bool)
    expected = logprobs_by_loop(logits)[..., 100]
    np.testing.assert_allclose(rlhf.token_logprobs(logits, tokens), expected, rtol=1e-5)
    loss, _ = rlhf.cross_entropy_loss(logits, tokens, mask)
    np.testing.assert_allclose(loss, -expected.mean(), rtol=1e-5)
    unembedding, hidden = logits[0].T.copy(), np.eye(3, dtype=np.float32)[None].repeat(2, axis=0)
    linear, _ = rlhf.linear_token_logprobs(hidden, unembedding, tokens)
    np.testing.assert_allclose(linear[1], expected[0], rtol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_distribution_are_nan_with_a_gradient_of_zero(rng, garbage):
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    mask, tokens = np.array([[True, True, False], [True, False, False]]), np.zeros((2, 3), int)
    poisoned = np.where(mask[..., None], logits, garbage).astype(np.float32)

    def loss(logits):
        logprobs, entropy = rlhf.token_logprobs(logits, tokens), rlhf.token_entropy(logits)
        bonus = rlhf.masked_mean(entropy, mask)
        return rlhf.reinforce_loss(logprobs, jnp.ones_like(logprobs), mask)[0] - bonus

    assert np.isnan(rlhf.token_logprobs(poisoned, tokens)[~mask]).all()
    assert np.isnan(rlhf.token_entropy(poisoned)[~mask]).all()
    expected, actual = jax.value_and_grad(loss)(logits), jax.value_and_grad(loss)(poisoned)
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])


@pytest.mark.parametrize("token", [-1, -100, 3])
def test_a_token_outside_the_vocabulary_is_nan_and_not_another_token(token):
    assert np.isnan(rlhf.token_logprobs(np.zeros(3, np.float32), np.array(token)))


@pytest.mark.parametrize("factor", [1.0, 10.0, -1e6])
def test_the_entropy_has_a_finite_gradient_beside_impossible_tokens(factor):
    """However large what it is multiplied with."""
    for row in ([0.0, 0.0, -jnp.inf], [10.0, 0.0, -jnp.inf]):
        logits = jnp.array(row)
        result = jax.grad(lambda x: factor * rlhf.token_entropy(x))(logits)
        expected = factor * jax.grad(rlhf.token_entropy)(logits[:2])
        np.testing.assert_allclose(result[:2], expected, rtol=1e-5, atol=1e-6 * abs(factor))
        assert result[2] == 0


def test_gradients_of_large_logits_are_those_of_small_ones():
    logits = jnp.array([0.5, -1.0, 2.0, 0.25])
    gradient = jax.grad(lambda x: rlhf.token_logprobs(x, jnp.array(1)))
    np.testing.assert_allclose(gradient(logits + 2.0**14), gradient(logits), rtol=1e-5, atol=1e-6)
