"""From logits to a token: the distribution, its filters, and the limits of the unit interval."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rollout import sampling
from rlhf_jax.rollout.sampling import filtered_logprobs, sample_token

ALMOST_ONE = np.nextafter(np.float32(1.0), np.float32(0.0))


def filtered_by_loop(logits, temperature, top_k, top_p):
    """Probabilities after the filters: sort, cut, normalise, one row."""
    logits = np.asarray(logits, np.float64) / temperature
    weights = np.exp(logits - logits.max())
    order = sorted(range(len(logits)), key=lambda v: -weights[v])
    if top_k:
        smallest = weights[order[min(top_k, len(order)) - 1]]
        weights = np.where(weights >= smallest, weights, 0.0)
    if top_p < 1.0:
        probabilities, kept = weights / weights.sum(), []
        for v in order:
            kept.append(v)
            if probabilities[kept].sum() >= top_p:
                break
        weights = np.where(np.isin(np.arange(len(weights)), kept), weights, 0.0)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (4, 1.0), (99, 1.0), (0, 0.7), (0, 1e-6), (5, 0.5)]
)
def test_filters_match_a_loop(temperature, top_k, top_p):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 13)).astype(np.float32) * 2
    logits[0, 3] = -np.inf
    logits[1] = 0.0  # all equal: ties
    logits[2, 5:8] = logits[2].max()  # the likeliest three tie
    run = jax.jit(filtered_logprobs, static_argnames=("temperature", "top_k", "top_p"))
    logprobs = run(jnp.asarray(logits), temperature=temperature, top_k=top_k, top_p=top_p)
    assert logprobs.dtype == jnp.float32
    for row in range(5):
        expected = filtered_by_loop(logits[row], temperature, top_k, top_p)
        np.testing.assert_allclose(np.exp(logprobs[row]), expected, rtol=1e-5, atol=1e-7)


def test_top_p_keeps_the_token_that_crosses_it_and_none_after():
    """Of equal ones no more than it needs."""
    logits = jnp.log(jnp.array([[0.5, 0.125, 0.25, 0.125]]))
    for top_p, kept in (
        (0.4, [0]), (0.5, [0]), (0.6, [0, 2]), (0.75, [0, 2]), (0.8, [0, 1, 2]), (1.0, [0, 1, 2, 3])
    ):  # fmt: skip
        logprobs = np.asarray(filtered_logprobs(logits, top_p=top_p))
        assert np.flatnonzero(np.isfinite(logprobs[0])).tolist() == kept, top_p


@pytest.mark.parametrize("vocab_size", [1, 5, 256, 300, 700])
def test_every_token_gets_its_share_of_the_unit_interval(vocab_size):
    rng = np.random.default_rng(vocab_size)
    probabilities = rng.dirichlet(np.full(vocab_size, 0.3)).astype(np.float32)
    probabilities[rng.random(vocab_size) < 0.3] = 0.0
    probabilities[0] = 0.1
    probabilities /= probabilities.sum()
    logprobs = jnp.log(jnp.asarray(probabilities))[None]
    grid = (np.arange(20_000, dtype=np.float32) + 0.5) / 20_000
    run = jax.jit(jax.vmap(lambda u: sample_token(logprobs, u[None])[0]))
    tokens = np.asarray(run(grid))
    assert tokens.dtype == np.int32
    assert (np.diff(tokens) >= 0).all()  # the inverse of a cumulative distribution
    shares = np.bincount(tokens, minlength=vocab_size) / len(grid)
    np.testing.assert_allclose(shares, probabilities, atol=2.0 / len(grid))


def test_random_draws_follow_the_distribution():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(300, 2.0))
    logprobs = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (50_000, 300))
    uniform = jax.random.uniform(jax.random.key(0), (50_000,))
    counts = np.bincount(np.asarray(jax.jit(sample_token)(logprobs, uniform)), minlength=300)
    expected = probabilities * 50_000
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 299 degrees of freedom: mean 299, deviation 24.5.
    assert 200 < chi_square < 400


@pytest.mark.parametrize("vocab_size", [3, 256, 600])
@pytest.mark.parametrize("sums", ["in sequence", "in a tree"])
def test_an_impossible_token_is_never_drawn(vocab_size, sums, monkeypatch):
    if sums == "in a tree":  # as accelerators do; its roundings are not monotonic

        def tree_sum(x, axis):
            return jax.lax.associative_scan(jnp.add, x, axis=axis)

        monkeypatch.setattr(sampling.jnp, "cumsum", tree_sum)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(8, vocab_size)).astype(np.float32) * 3
    logits[rng.random((8, vocab_size)) < 0.5] = -np.inf
    logits[:, vocab_size // 2] = 1.0
    logits[:, 0] = logits[:, -1] = -np.inf
    logprobs = jax.nn.log_softmax(jnp.asarray(logits))
    # The sums at which one token gives way to the next are where rounding decides.
    edges = np.cumsum(np.exp(logprobs), axis=1, dtype=np.float32)
    near = [np.nextafter(edges, np.float32(side)) for side in (0.0, 1.0)]
    uniform = np.concatenate([edges, *near, np.zeros((8, 1)), np.full((8, 1), ALMOST_ONE)], 1)
    uniform = np.clip(uniform, 0.0, ALMOST_ONE).astype(np.float32)
    # A new function, and so a new trace, for each kind of sum.
    run = jax.jit(jax.vmap(lambda u: sample_token(logprobs, u), in_axes=1, out_axes=1))
    tokens = np.asarray(run(uniform))
    assert np.isfinite(np.take_along_axis(np.asarray(logprobs), tokens, axis=1)).all()


@pytest.mark.parametrize("vocab_size", [3, 300])
def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token(vocab_size):
    logits = jnp.zeros((2, vocab_size)).at[:, 0].set(-jnp.inf).at[:, -1].set(-jnp.inf)
    uniform = jnp.array([0.0, ALMOST_ONE])
    tokens = sample_token(jax.nn.log_softmax(logits), uniform)
    np.testing.assert_array_equal(tokens, [1, vocab_size - 2])
