"""Properties of losses on preferences, for all examples of a kind."""

import chex
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import rlhf_jax as rlhf
from rlhf_jax import functional
from tests.functional.preference_by_loop import (
    KINDS,
    draw,
    sigmoid,
)

# Of the formulas: test_all.py holds on both ends of the versions that each function compiles.
pytestmark = pytest.mark.newest

logprob = st.floats(-50.0, 0.0, width=32)
pairs_of_logprobs = st.lists(st.tuples(logprob, logprob, logprob, logprob), min_size=3, max_size=3)
betas = st.floats(0.03125, 2.0, width=32)


def columns(examples):
    return np.float32(examples).T


@hypothesis.given(pairs_of_logprobs, betas)
def test_the_gradient_of_dpo_is_the_published_one(examples, beta):
    """-beta * sigmoid(-z) * (grad log pi(chosen) - grad log pi(rejected)), z the reward margin.

    The policy is a softmax over four responses, of which the first two are a pair, and the gradient
    is the one by its logits.
    """
    logits = np.float32(examples)
    ref = logits[:, 2:]

    def logprobs(logits):
        logp = jax.nn.log_softmax(logits)
        return logp[:, 0], logp[:, 1]

    def loss(logits):
        return functional.dpo_loss(*logprobs(logits), *ref.T, beta=beta)[0]

    chosen, rejected = logprobs(logits)
    z = np.float64(beta) * ((np.float64(chosen) - ref[:, 0]) - (np.float64(rejected) - ref[:, 1]))
    of_chosen, of_rejected = (
        jax.grad(lambda logits, i=i: logprobs(logits)[i].sum())(logits) for i in (0, 1)
    )
    direction = np.float64(of_chosen) - np.float64(of_rejected)
    published = -beta * sigmoid(-z)[:, None] * direction / len(examples)
    np.testing.assert_allclose(jax.grad(loss)(logits), published, rtol=1e-4, atol=1e-6)


@hypothesis.given(pairs_of_logprobs, betas, st.sampled_from(KINDS), st.integers(-64, 64))
def test_one_constant_on_policy_and_reference_changes_nothing(examples, beta, kind, constant):
    """Nor does the same constant on both responses of a pair: both cancel in h.

    Log-probabilities are rounded to quarters, so that float32 adds the constant exactly.
    """
    policy_c, policy_r, ref_c, ref_r = np.round(4 * columns(examples)) / 4

    def loss(*arrays):
        return functional.dpo_loss(*(np.float32(x) for x in arrays), beta=beta, kind=kind)

    expected = loss(policy_c, policy_r, ref_c, ref_r)
    shifted = loss(policy_c + constant, policy_r, ref_c + constant, ref_r)
    chex.assert_trees_all_close(shifted[0], expected[0], rtol=1e-6)
    chex.assert_trees_all_close(shifted[1], expected[1], rtol=1e-6)
    both = loss(policy_c + constant, policy_r + constant, ref_c, ref_r)
    np.testing.assert_allclose(both[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(both[1]["margin"], expected[1]["margin"], rtol=1e-6)


@hypothesis.given(pairs_of_logprobs, betas, st.floats(0.0, 1.0))
def test_conservative_dpo_of_swapped_pairs_has_the_other_smoothing(examples, beta, smoothing):
    policy_c, policy_r, ref_c, ref_r = columns(examples)
    one, _ = functional.dpo_loss(
        policy_c, policy_r, ref_c, ref_r, beta=beta, label_smoothing=smoothing
    )
    other, _ = functional.dpo_loss(
        policy_r, policy_c, ref_r, ref_c, beta=beta, label_smoothing=1 - smoothing
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@hypothesis.given(pairs_of_logprobs, betas, st.floats(0.0, 0.45))
def test_over_swaps_of_labels_robust_dpo_is_in_expectation_dpo(examples, beta, smoothing):
    policy_c, policy_r, ref_c, ref_r = columns(examples)
    robust = {"beta": beta, "kind": "robust", "label_smoothing": smoothing}
    kept, _ = functional.dpo_loss(policy_c, policy_r, ref_c, ref_r, **robust)
    swapped, _ = functional.dpo_loss(policy_r, policy_c, ref_r, ref_c, **robust)
    expected, _ = functional.dpo_loss(policy_c, policy_r, ref_c, ref_r, beta=beta)
    mean = (1 - smoothing) * np.float64(kept) + smoothing * np.float64(swapped)
    # The two cancel, the more the nearer the smoothing is to 1/2.
    size = 1 + np.abs(columns(examples)).max() / (1 - 2 * smoothing)
    np.testing.assert_allclose(mean, expected, atol=1e-5 * size)


@hypothesis.given(pairs_of_logprobs, betas)
def test_without_smoothing_sigmoid_conservative_and_robust_are_one(examples, beta):
    arrays = columns(examples)
    plain = rlhf.dpo_loss(*arrays, beta=beta)
    conservative = rlhf.dpo_loss(*arrays, beta=beta, label_smoothing=0.0)
    robust = rlhf.dpo_loss(*arrays, beta=beta, kind="robust", label_smoothing=0.0)
    chex.assert_trees_all_close(conservative, plain, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_close(robust, plain, rtol=1e-6, atol=1e-7)


@hypothesis.given(pairs_of_logprobs, betas)
def test_simpo_without_a_target_margin_is_dpo_without_a_reference(examples, beta):
    chosen, rejected = columns(examples)[:2]
    nothing = np.zeros_like(chosen)
    chex.assert_trees_all_close(
        functional.simpo_loss(chosen, rejected, beta=beta, gamma=0.0),
        functional.dpo_loss(chosen, rejected, nothing, nothing, beta=beta),
        rtol=1e-6,
        atol=1e-7,
    )


def test_lengths_of_one_are_no_lengths_and_may_be_floats(rng):
    logprobs = draw(rng, 4, 5)
    expected = rlhf.dpo_loss(*logprobs, kind="ipo")
    for dtype in (np.int32, np.float32):
        ones = (np.ones(5, dtype),) * 2
        chex.assert_trees_all_equal(rlhf.dpo_loss(*logprobs, kind="ipo", lengths=ones), expected)


def test_lengths_may_be_mapped_over(rng):
    logprobs = draw(rng, 4, 3, 5)
    lengths = tuple(rng.integers(0, 9, size=(2, 3, 5)))

    def loss(logprobs, lengths):
        return rlhf.dpo_loss(*logprobs, kind="ipo", lengths=lengths)

    mapped = jax.vmap(loss, (1, 0))(logprobs, lengths)
    looped = [loss(logprobs[:, i], (lengths[0][i], lengths[1][i])) for i in range(3)]
    chex.assert_trees_all_close(mapped, jax.tree.map(lambda *x: np.stack(x), *looped), rtol=1e-6)


def test_an_empty_response_has_no_length_to_divide_by(rng):
    logprobs = np.zeros((4, 2), np.float32)
    loss, _ = rlhf.dpo_loss(*logprobs, kind="ipo", beta=0.5, lengths=(np.zeros(2, int),) * 2)
    assert loss == 1.0
