"""Importance weights, differences of log-probabilities, and the choice by entropy."""

import numpy as np
import pytest

import rlhf_jax as rlhf


@pytest.mark.parametrize(("level", "mode"), [("token", "truncate"), ("sequence", "mask")])
def test_importance_weights_match_a_loop(rng, ragged_mask, level, mode):
    sampler = -np.exp(rng.normal(size=ragged_mask.shape)).astype(np.float32)
    logprobs = (sampler + 0.3 * rng.normal(size=sampler.shape)).astype(np.float32)
    expected, counted = np.zeros(sampler.shape), []
    for b, row in enumerate(ragged_mask):
        tokens = np.nonzero(row)[0]
        differences = [float(logprobs[b, t]) - float(sampler[b, t]) for t in tokens]
        for t, difference in zip(tokens, differences, strict=True):
            weight = np.exp(difference if level == "token" else sum(differences))
            is_capped = weight > 1.2
            if is_capped:
                weight = 1.2 if mode == "truncate" else 0.0
            expected[b, t] = weight
            if level == "token" or t == tokens[0]:
                counted.append((weight, is_capped))
    weights, metrics = rlhf.importance_weights(
        logprobs, sampler, ragged_mask, level=level, cap=1.2, mode=mode
    )
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    values, is_capped = np.array(counted).T
    assert 0 < is_capped.mean() < 1
    summary = (values.min(), values.mean(), values.max(), is_capped.mean())
    actual = [metrics[name] for name in ("min", "mean", "max", "capfrac")]
    np.testing.assert_allclose(actual, summary, rtol=1e-5)
    parts = [
        rlhf.importance_weights(
            logprobs[part], sampler[part], ragged_mask[part],
            level=level, cap=1.2, mode=mode, denominator=len(counted),
        )[1]
        for part in (slice(2), slice(2, None))
    ]  # fmt: skip
    for name in ("mean", "capfrac"):
        np.testing.assert_allclose(sum(part[name] for part in parts), metrics[name], rtol=1e-5)


def test_a_token_that_the_sampler_found_impossible_has_a_limited_weight():
    logprobs, sampler = np.float32([[-1.0, -1.0]]), np.float32([[-np.inf, -1.0]])
    weights, _ = rlhf.importance_weights(
        logprobs, sampler, np.ones((1, 2), bool), level="sequence", cap=np.inf
    )
    np.testing.assert_allclose(weights, np.full((1, 2), np.exp(40.0)), rtol=1e-5)
    with pytest.raises(ValueError, match="^cap must be above 0, but is 0"):
        rlhf.functional.importance_weights(
            logprobs, sampler, np.ones((1, 2), bool), level="token", cap=0
        )


@pytest.mark.parametrize("share", [0.0, 0.2, 0.45, 1.0])
def test_top_entropy_mask_is_the_quantile_of_the_real_tokens(rng, ragged_mask, share):
    entropy = rng.exponential(size=ragged_mask.shape).astype(np.float32)
    poisoned = np.where(ragged_mask, entropy, np.nan).astype(np.float32)
    chosen = rlhf.top_entropy_mask(poisoned, ragged_mask, share=share)
    threshold = np.quantile(np.float64(entropy[ragged_mask]), 1 - np.float32(share))
    np.testing.assert_array_equal(chosen, ragged_mask & (entropy >= threshold - 1e-9))
    # Tokens without any uncertainty all have the entropy of the threshold.
    certain = rlhf.top_entropy_mask(np.zeros_like(entropy), ragged_mask, share=share)
    np.testing.assert_array_equal(certain, ragged_mask)


def test_logprob_difference_is_over_real_tokens(rng, ragged_mask):
    one, other = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)
    poisoned = np.where(ragged_mask, other, np.inf).astype(np.float32)
    distance = np.abs(one - other)[ragged_mask]
    differences = rlhf.logprob_difference(one, poisoned, ragged_mask)
    np.testing.assert_allclose(differences, (distance.mean(), distance.max()), rtol=1e-6)
