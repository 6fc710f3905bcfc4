"""Length desensitisation and WPO's weights."""

import jax
import numpy as np
import pytest

from rlhf_jax import functional


def ragged(rng):
    mask = np.arange(6) < np.array([6, 1, 4, 0])[:, None]
    return -np.exp(rng.normal(size=(4, 6))).astype(np.float32), mask


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_excess_tokens_weigh_alpha(rng, alpha):
    logprobs, mask = ragged(rng)
    mask[0, 2] = False  # a gap: real tokens are counted, not positions
    others = np.array([3, 5, 0, 2])
    expected = []
    for row, real, other in zip(logprobs, mask, others, strict=True):
        weights = [1 if count <= other else alpha for count in range(1, real.sum() + 1)]
        expected.append(sum(w * float(x) for w, x in zip(weights, row[real], strict=True)))
    poisoned = np.where(mask, logprobs, np.nan)

    def total(logprobs):
        output = functional.length_desensitized_logprobs(logprobs, mask, others, alpha=alpha)
        return output.sum(), output

    (_, output), gradient = jax.value_and_grad(total, has_aux=True)(poisoned)
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    assert gradient[0].tolist() == np.float32([1, 1, 0, 1, alpha, alpha]).tolist()
    assert np.all(gradient[~mask] == 0)


def test_collision_entropy_is_that_of_the_distribution(rng):
    logits = rng.normal(scale=3.0, size=(4, 7)).astype(np.float32)
    logits[:, 2] = -np.inf
    for shift in (0.0, 1e3):
        p = np.exp(np.float64(logits - logits.max(1, keepdims=True)))
        p /= p.sum(1, keepdims=True)
        entropy = functional.token_collision_entropy(logits + np.float32(shift))
        rtol = 1e-5 if shift == 0 else 1e-3  # of logits that are rounded themselves
        np.testing.assert_allclose(entropy, -np.log((p**2).sum(1)), rtol=rtol)
    assert functional.token_collision_entropy(np.zeros(8, np.float32)) == pytest.approx(np.log(8))
    assert np.isnan(functional.token_collision_entropy(np.full(3, -np.inf, np.float32)))


def test_wpo_weights_match_a_loop_and_have_no_gradient(rng):
    _, mask = ragged(rng)
    logits = rng.normal(scale=2.0, size=(4, 6, 5)).astype(np.float32)
    tokens = rng.integers(0, 5, size=(4, 6))
    expected = []
    for row, ids, real in zip(np.float64(logits), tokens, mask, strict=True):
        logs = []
        for x, token in zip(row[real], ids[real], strict=True):
            p = np.exp(x) / np.exp(x).sum()
            logs.append(np.log(p[token] / (p**2).sum()))
        expected.append(np.exp(np.mean(logs)) if logs else 1.0)
    poisoned = np.where(mask[..., None], logits, np.nan)

    def total(logits):
        entropy = functional.token_collision_entropy(logits)
        weights = functional.wpo_weights(functional.token_logprobs(logits, tokens), entropy, mask)
        return weights.sum(), weights

    (_, weights), gradient = jax.value_and_grad(total, has_aux=True)(poisoned)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert np.all(gradient == 0)


def test_the_weight_of_a_certain_response_is_one_and_of_even_odds_too():
    """The most probable token of a peaked distribution has more."""
    logits = np.log(np.float32([[[1, 0, 0, 0]], [[0.25] * 4], [[0.7, 0.1, 0.1, 0.1]]]) + 1e-30)
    tokens, mask = np.zeros((3, 1), int), np.ones((3, 1), bool)
    weights = functional.wpo_weights(
        functional.token_logprobs(logits, tokens), functional.token_collision_entropy(logits), mask
    )
    np.testing.assert_allclose(weights, [1, 1, 0.7 / 0.52], rtol=1e-6)
