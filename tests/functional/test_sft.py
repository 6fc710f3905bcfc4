"""Cross entropy against a loop."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rlhf


def cross_entropy_by_loop(logits, targets, mask, label_smoothing, z_loss):
    losses, nlls, hits = [], [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        row = np.float64(logits[b, t])
        log_normalizer = np.log(np.exp(row).sum())
        nll = log_normalizer - row[targets[b, t]]
        uniform = np.mean(log_normalizer - row[np.isfinite(row)])
        loss = (1 - label_smoothing) * nll + label_smoothing * uniform
        losses.append(loss + z_loss * log_normalizer**2)
        nlls.append(nll)
        hits.append(row.argmax() == targets[b, t])
    return np.mean(losses), np.mean(nlls), np.mean(hits)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.1, 0.03)])
def test_cross_entropy_matches_a_loop(rng, ragged_mask, label_smoothing, z_loss):
    logits = rng.normal(size=(*ragged_mask.shape, 6)).astype(np.float32)
    logits[..., 4:] = -np.inf
    targets = rng.integers(0, 4, size=ragged_mask.shape)
    loss, metrics = rlhf.cross_entropy_loss(
        logits, targets, ragged_mask, label_smoothing=label_smoothing, z_loss=z_loss
    )
    expected = cross_entropy_by_loop(logits, targets, ragged_mask, label_smoothing, z_loss)
    assert 0 < expected[2] < 1
    np.testing.assert_allclose([loss, metrics["nll"], metrics["accuracy"]], expected, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize(
    ("terms", "limits"),
    [
        ({}, {}),
        ({"label_smoothing": 0.1, "z_loss": 0.03}, {"softcap": 2.0, "logit_scale": 0.6}),
    ],
    ids=["plain", "all terms"],
)
def test_cross_entropy_from_hidden_states(rng, ragged_mask, chunk_size, terms, limits):
    """Against the loop, its gradients against those of all logits; the padding starts at 6."""
    hidden = rng.normal(size=(*ragged_mask.shape, 4)).astype(np.float32)
    unembedding = rng.normal(size=(9, 4)).astype(np.float32)
    unembedding[6:] = np.nan
    targets = rng.integers(0, 6, size=ragged_mask.shape)

    def from_logits(hidden, unembedding, terms, limits):
        logits = limits.get("logit_scale", 1.0) * (hidden @ unembedding[:6].T)
        if limits:
            logits = limits["softcap"] * jnp.tanh(logits / limits["softcap"])
        loss, metrics = rlhf.cross_entropy_loss(logits, targets, ragged_mask, **terms)
        return loss, (metrics, logits)

    def linear(hidden, unembedding, terms, limits):
        arrays, sizes = (hidden, unembedding, targets, ragged_mask), (chunk_size, 6)
        options = dict(zip(("chunk_size", "vocab_size"), sizes, strict=True))
        return rlhf.linear_cross_entropy_loss(*arrays, **terms, **limits, **options)

    poisoned = np.where(ragged_mask[..., None], hidden, np.nan)
    arguments = (unembedding, terms, limits)
    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)
    (loss, metrics), actual = gradient(linear)(poisoned, *arguments)
    (_, (_, logits)), expected = gradient(from_logits)(hidden, *arguments)
    smoothing, z_loss = terms.get("label_smoothing", 0.0), terms.get("z_loss", 0.0)
    by_loop = cross_entropy_by_loop(logits, targets, ragged_mask, smoothing, z_loss)
    found_values = [loss, metrics["nll"], metrics["accuracy"]]
    np.testing.assert_allclose(found_values, by_loop, rtol=1e-5)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    only_value = linear(poisoned, *arguments)
    chex.assert_trees_all_close(only_value, (loss, metrics), rtol=1e-6)


def test_the_gradient_is_probability_less_target(rng):
    logits = rng.normal(size=(1, 2, 4)).astype(np.float32)
    targets, mask = np.array([[1, 2]]), np.ones((1, 2), bool)
    loss = lambda x: rlhf.cross_entropy_loss(x, targets, mask)[0]  # noqa: E731
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        jax.grad(loss)(logits), (p - np.eye(4)[targets]) / 2, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_confident_logits_have_finite_losses_and_gradients(scale):
    logits = np.float32([[[scale, 0.0, -np.inf]]])
    targets, mask = np.array([[0]]), np.ones((1, 1), bool)
    loss = lambda x: rlhf.cross_entropy_loss(  # noqa: E731
        x, targets, mask, label_smoothing=0.1, z_loss=1e-4
    )[0]
    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_an_impossible_target_has_an_infinite_loss_and_a_finite_gradient(label_smoothing):
    logits, mask = np.float32([[[0.0, 0.0, -np.inf]]]), np.ones((1, 1), bool)
    loss = lambda x: rlhf.cross_entropy_loss(  # noqa: E731
        x, np.array([[2]]), mask, label_smoothing=label_smoothing
    )[0]
    value, gradient = jax.value_and_grad(loss)(logits)
    assert value == np.inf
    assert np.isfinite(gradient).all()


def test_accuracy_is_that_of_argmax_in_ties_and_of_what_is_no_number():
    examples = [
        ([1.0, 3.0, 3.0], 1, True),  # the first of those that are largest
        ([1.0, 3.0, 3.0], 2, False),
        ([0.0, 0.0, 0.0], 0, True),
        ([-np.inf, -np.inf, 0.0], 2, True),
        ([-np.inf, 0.0, np.inf], 2, True),
        ([0.0, 1.0, 0.0], -1, False),
        ([0.0, 0.0, 1.0], -1, False),
        ([0.0, 1.0, 0.0], 3, False),
        ([np.nan, np.nan, np.nan], 0, False),
        ([0.0, np.nan, 0.0], 1, False),
        ([0.0, np.nan, 1.0], 2, False),
    ]
    for logits, target, correct in examples:
        arrays = (np.float32([[logits]]), np.array([[target]]), np.array([[True]]))
        assert rlhf.cross_entropy_loss(*arrays)[1]["accuracy"] == correct
