"""KL estimates and coefficient controllers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlhf_jax as rlhf
from rlhf_jax.functional.kl import exp_minus_linear

BY_NAME = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: np.expm1(-d) + d,
}


@pytest.mark.parametrize("kind", BY_NAME)
@pytest.mark.parametrize("scale", [0.2, 1.0, 10.0])
def test_estimates_match_numpy(rng, kind, scale):
    logprobs, ref = (scale * rng.normal(size=(2, 3, 5))).astype(np.float32)
    expected = BY_NAME[kind](np.float64(logprobs) - np.float64(ref))
    estimate = rlhf.kl_estimate(logprobs, ref, kind)
    np.testing.assert_allclose(estimate, expected, rtol=2e-5, atol=1e-6)


def test_the_default_is_k1():
    assert rlhf.kl_estimate(np.float32([3.0]), np.float32([1.0])) == 2.0


def test_k1_and_k3_are_unbiased():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    logp, logq = np.log(p).astype(np.float32), np.log(q).astype(np.float32)
    for kind in ("k1", "k3"):
        mean = np.sum(p * rlhf.kl_estimate(logp, logq, kind))
        np.testing.assert_allclose(mean, np.sum(p * np.log(p / q)), rtol=1e-5)


@given(st.floats(-30.0, 30.0, width=32))
def test_k2_and_k3_are_never_negative(difference):
    zero = np.zeros(1, np.float32)
    for kind in ("k2", "k3"):
        assert rlhf.kl_estimate(zero + np.float32(difference), zero, kind) >= 0


def test_k3_keeps_its_digits_near_zero():
    x = np.array([-0.3, -0.11, -0.0999, -1e-3, -1e-6, 0.0, 1e-5, 0.01, 0.0999, 0.11], np.float32)
    wide = x.astype(np.float64)
    expected = np.where(np.abs(x) < 1e-3, wide**2 / 2 + wide**3 / 6, np.expm1(wide) - wide)
    np.testing.assert_allclose(exp_minus_linear(jnp.asarray(x)), expected, rtol=5e-6)
    gradient = jax.vmap(jax.grad(exp_minus_linear))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.expm1(wide), rtol=1e-5)


@pytest.mark.parametrize("kind", BY_NAME)
@pytest.mark.parametrize("difference", [-1e13, -89.0, 89.0, 1e13])
def test_extreme_differences_have_finite_values_and_gradients(kind, difference):
    logprobs, ref = np.float32([difference]), np.zeros(1, np.float32)
    estimate = lambda x: rlhf.kl_estimate(x, ref, kind)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(estimate)(logprobs)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def token_kl_by_loop(logits, ref_logits):
    out = np.zeros(logits.shape[:-1])
    for index in np.ndindex(out.shape):
        p, q = (np.exp(np.float64(x[index]) - x[index].max()) for x in (logits, ref_logits))
        p, q = p / p.sum(), q / q.sum()
        for v in range(len(p)):
            if p[v] > 0:
                out[index] += p[v] * np.log(p[v] / q[v])
    return out


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_the_kl_over_the_vocabulary_is_that_of_a_loop(rng, scale):
    logits, ref = (scale * rng.normal(size=(2, 3, 4, 9))).astype(np.float32)
    logits[0, 0, 3:] = -np.inf
    ref[0, 0, 5:] = -np.inf
    expected = token_kl_by_loop(logits, ref)
    np.testing.assert_allclose(rlhf.token_kl(logits, ref), expected, rtol=1e-4, atol=1e-6)
    # A constant is no difference, however large: 1e3 costs digits of the logits, and no more.
    shifted = rlhf.token_kl(logits + np.float32(1e3), ref)
    np.testing.assert_allclose(shifted, expected, rtol=1e-2, atol=2e-3)
    assert np.abs(rlhf.token_kl(logits, logits)).max() < 1e-6


def test_the_kl_over_the_vocabulary_is_the_mean_of_k1(rng):
    logits, ref = rng.normal(size=(2, 6)).astype(np.float32)
    logprobs, ref_logprobs = (
        jnp.stack([rlhf.token_logprobs(x, jnp.int32(v)) for v in range(6)]) for x in (logits, ref)
    )
    mean = jnp.sum(jnp.exp(logprobs) * rlhf.kl_estimate(logprobs, ref_logprobs))
    np.testing.assert_allclose(rlhf.token_kl(logits, ref), mean, rtol=1e-5)


def test_the_kl_to_what_the_reference_rules_out_is_infinite():
    ruled_out = np.float32([0.0, -np.inf])
    assert rlhf.token_kl(np.zeros(2, np.float32), ruled_out) == np.inf
    gradient = jax.grad(rlhf.token_kl)(ruled_out, np.zeros(2, np.float32))
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_the_kl_of_what_is_no_distribution_is_nan_with_a_gradient_of_zero(garbage):
    garbled, plain = np.float32([0.0, garbage]), np.float32([0.0, 1.0])
    for pair in ((garbled, plain), (plain, garbled)):
        value, gradients = jax.value_and_grad(rlhf.token_kl, argnums=(0, 1))(*pair)
        assert np.isnan(value)
        np.testing.assert_array_equal(np.stack(gradients), 0.0)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="^kind must be one of 'k1', 'k2', 'k3', but is 'k4'"):
        rlhf.kl_estimate(np.zeros(1, np.float32), np.zeros(1, np.float32), "k4")


@pytest.mark.parametrize(
    ("observed", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98), (-5.0, 0.98)],
)
def test_adaptive_coefficient(observed, factor):
    coef = rlhf.adaptive_kl_update(0.2, observed, 1000, target=6.0, horizon=10_000)
    np.testing.assert_allclose(coef, 0.2 * factor, rtol=1e-6)
    assert coef.dtype == jnp.float32


@pytest.mark.parametrize(
    ("observed", "factor"), [(0.0, 0.5), (0.6, 0.5), (0.7, 1), (1.4, 1), (1.6, 2), (9.0, 2)]
)
def test_penalty_coefficient(observed, factor):
    coef = rlhf.penalty_kl_update(0.3, observed, target=1.0)
    np.testing.assert_allclose(coef, 0.3 * factor, rtol=1e-6)
    assert coef.dtype == jnp.float32
