"""Properties that hold for all inputs: of masks, shifts, permutations, and between functions."""

import functools
import itertools

import chex
import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rlhf_jax as rlhf
from tests.functional.case import SHARED, function_name
from tests.functional.cases import make_cases

# Of the formulas: test_all.py holds on both ends of the versions that each function compiles.
pytestmark = pytest.mark.newest

# Shapes are few, since each one compiles anew: the real tokens are always as many.
B, T, V, REAL = 4, 6, 5, 12
LENGTHS = [x for x in itertools.product(range(T + 1), repeat=B) if sum(x) == REAL]

OF_TOKENS = {
    "cross_entropy_loss": ("logits", "targets"),
    "kl_penalty_policy_loss": ("logprobs", "old_logprobs", "advantages"),
    "ppo_policy_loss": ("logprobs", "old_logprobs", "advantages"),
    "ppo_value_loss": ("values", "old_values", "returns"),
    "reinforce_loss": ("logprobs", "advantages"),
}
COEFFICIENTS = {
    "cross_entropy_loss": {"label_smoothing": 0.1, "z_loss": 0.01},
    "kl_penalty_policy_loss": {"kl_coef": 0.3},
}


def batched(case):
    """Names of the arrays with a batch axis."""
    return [name for name, x in case.arrays.items() if x.ndim and name not in SHARED]


# All but the functions of batches of two sizes.
BATCHED = {
    name: case
    for name, case in make_cases(0).items()
    if {len(case.arrays[key]) for key in batched(case)} == {B}
}


def floats(*shape, size=4.0):
    return hnp.arrays(np.float32, shape, elements=st.floats(-size, size, width=32))


def eighths(*shape):
    """Numbers that integers can be added to without rounding."""
    return hnp.arrays(np.int32, shape, elements=st.integers(-32, 32)).map(
        lambda x: (x / 8).astype(np.float32)
    )


masks = st.sampled_from(LENGTHS).map(lambda lengths: np.arange(T) < np.array(lengths)[:, None])
# Where each response is truncated to its own length, which compiles anew for each length.
few_lengths = [x for x in LENGTHS if set(x) <= {0, 1, 5, 6}]
few_masks = st.sampled_from(few_lengths).map(lambda x: np.arange(T) < np.array(x)[:, None])


@functools.cache
def with_gradient(name, **options):
    """The compiled (loss, metrics) and the gradient by the first array."""
    loss = functools.partial(getattr(rlhf, name), **options)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def token_arrays(name, numbers, logits, targets):
    own = {"logits": logits, "targets": targets}
    spare = iter(numbers)
    return [own[key] if key in own else next(spare) for key in OF_TOKENS[name]]


def poisoned(mask, x):
    filler = np.nan if x.dtype == np.float32 else -100
    return np.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, filler).astype(
        x.dtype
    )


def sum_of(outputs):
    return jax.tree.map(lambda *x: sum(x), *outputs)


@pytest.mark.parametrize("name", OF_TOKENS)
@given(
    mask=masks,
    numbers=floats(3, B, T),
    logits=floats(B, T, V),
    targets=hnp.arrays(np.int32, (B, T), elements=st.integers(0, V - 1)),
)
def test_masking_equals_joining_the_responses_without_their_padding(
    name, mask, numbers, logits, targets
):
    arrays = token_arrays(name, numbers, logits, targets)
    function = with_gradient(name, **COEFFICIENTS.get(name, {}))
    output, gradient = function(*(poisoned(mask, x) for x in arrays), mask)
    joined, expected = function(*(x[mask][None] for x in arrays), np.ones((1, REAL), bool))
    chex.assert_trees_all_close(output, joined, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(gradient[mask], expected[0], rtol=2e-5, atol=1e-5)
    assert not np.any(gradient[~mask])


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
@settings(max_examples=25)
@given(mask=few_masks, numbers=floats(3, B, T, size=1.0), advantages=floats(B))
def test_masking_equals_truncating_each_response_for_grpo(reduction, mask, numbers, advantages):
    counts = {"sequence": mask.any(axis=1).sum(), "token": REAL, "constant": B * T}

    def outputs(logprobs, old, ref, advantages, mask):
        return rlhf.grpo_loss(
            logprobs, old, advantages, mask,
            ref_logprobs=ref, kl_coef=0.3, reduction=reduction, denominator=counts[reduction],
        )  # fmt: skip

    full = outputs(*(poisoned(mask, x) for x in numbers), advantages, mask)
    cut = sum_of(
        outputs(*(x[[b], :n] for x in numbers), advantages[[b]], np.ones((1, n), bool))
        for b, n in enumerate(mask.sum(axis=1))
        if n
    )
    if reduction == "constant":  # its metrics need the examples to be of one size
        full, cut = full[0], cut[0]
    chex.assert_trees_all_close(full, cut, rtol=2e-5, atol=1e-5)


@settings(max_examples=25)
@given(mask=few_masks, other=few_masks, scores=floats(2, B, T), tokens=hnp.arrays(bool, (2, B, T)))
def test_masking_equals_truncating_each_pair_for_the_tokenwise_loss(mask, other, scores, tokens):
    sides, tokens = (mask, other), tokens.astype(np.int32)
    pairs = (mask | other).any(axis=1).sum()

    def outputs(*arrays):
        (loss, metrics) = rlhf.tokenwise_pairwise_loss(*arrays, denominator=pairs)
        end_scores = [metrics.pop(f"{side}_end_scores") for side in ("chosen", "rejected")]
        return (loss, metrics), np.stack(end_scores)

    arrays = [*map(poisoned, sides, scores), *map(poisoned, sides, tokens)]
    full, end_scores = outputs(*arrays, *sides)
    cut = {}
    for b, n in enumerate((mask | other).sum(axis=1)):
        if n:
            cut[b], of_pair = outputs(*(x[[b], :n] for x in (*arrays, *sides)))
            np.testing.assert_array_equal(end_scores[:, [b]], of_pair)
    chex.assert_trees_all_close(full, sum_of(cut.values()), rtol=2e-5, atol=1e-5)


@settings(max_examples=25)
@given(mask=few_masks, numbers=floats(2, B, T), scores=floats(B))
def test_masking_equals_truncating_each_response_for_rewards_and_advantages(mask, numbers, scores):
    def outputs(first, second, scores, mask):
        rewards, kl = rlhf.token_rewards(scores, first, second, mask, kl_coef=0.3)
        to_go = rlhf.rewards_to_go(rewards, mask, gamma=0.9)
        return rewards, kl, to_go, *rlhf.gae(rewards, second, mask, gamma=0.9, lam=0.8)

    full = outputs(*(poisoned(mask, x) for x in numbers), scores, mask)
    for b, n in enumerate(mask.sum(axis=1)):
        if n:
            cut = outputs(*(x[[b], :n] for x in numbers), scores[[b]], np.ones((1, n), bool))
            of_example = [x[[b], :n] for x in full]
            chex.assert_trees_all_close(of_example, list(cut), rtol=1e-5, atol=1e-5)


@given(scores=eighths(3, 4), counts=st.permutations([0, 1, 2, 3, 4]), data=st.data())
def test_the_ranking_loss_sees_only_the_order_of_the_real_responses(scores, counts, data):
    def spread(row, n):
        places = data.draw(st.permutations(range(4)))[:n]
        mask = np.isin(np.arange(4), places)
        spread = np.full(4, np.nan, np.float32)
        spread[mask] = row[:n]
        return spread, mask

    examples = [spread(row, n) for row, n in zip(scores, counts)]
    moved = rlhf.ranking_loss(*(np.stack(x) for x in zip(*examples)))
    in_front = rlhf.ranking_loss(scores, np.arange(4) < np.array(counts[:3])[:, None])
    chex.assert_trees_all_close(moved, in_front, rtol=1e-6)


@pytest.mark.parametrize("name", BATCHED)
@settings(max_examples=4)
@given(order=st.permutations(range(B)))
def test_a_permuted_batch_gives_the_same_scalars_and_permuted_arrays(name, order):
    case = BATCHED[name]
    function = functools.partial(
        getattr(rlhf, function_name(name)), **case.options, **case.coefficients
    )
    permuted = case.arrays | {key: case.arrays[key][order] for key in batched(case)}
    expected = jax.tree.map(lambda x: x[np.array(order)] if x.ndim else x, function(**case.arrays))
    chex.assert_trees_all_close(function(**permuted), expected, rtol=1e-5, atol=1e-6)


@given(
    mask=masks,
    logits=eighths(B, T, V),
    shift=hnp.arrays(np.int32, (B, T, 1), elements=st.integers(-64, 64)),
    targets=hnp.arrays(np.int32, (B, T), elements=st.integers(0, V - 1)),
)
def test_a_constant_added_to_logits_changes_nothing_that_a_softmax_sees(
    mask, logits, shift, targets
):
    def outputs(logits):
        loss = rlhf.cross_entropy_loss(logits, targets, mask, label_smoothing=0.1)
        return rlhf.token_logprobs(logits, targets), rlhf.token_entropy(logits), loss

    chex.assert_trees_all_close(outputs(logits + shift), outputs(logits), rtol=1e-5, atol=5e-5)


@given(scores=eighths(2, 5), shift=st.integers(-1000, 1000))
def test_a_constant_added_to_scores_changes_no_comparison(scores, shift):
    mask = np.array([[True] * 5, [True, True, False, True, False]])

    def outputs(scores):
        return (
            rlhf.pairwise_loss(scores[0], scores[1], margin=0.5),
            rlhf.ranking_loss(scores, mask),
            rlhf.leave_one_out_advantages(scores),
            rlhf.group_advantages(scores),
            rlhf.group_advantages(scores, scale=False),
        )

    moved = (scores + shift).astype(np.float32)
    chex.assert_trees_all_close(outputs(moved), outputs(scores), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["k2", "k3"])
@given(
    logprobs=hnp.arrays(np.float32, 8, elements=st.floats(-1e4, 0, width=32)),
    difference=hnp.arrays(np.float32, 8, elements=st.floats(-2, 2, width=32)),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
)
def test_k2_and_k3_are_never_negative(kind, logprobs, difference, scale):
    ref = (logprobs + scale * difference).astype(np.float32)
    kl = rlhf.kl_estimate(logprobs, ref, kind)
    assert np.all(kl >= 0)
    assert np.all(np.isfinite(kl))


def expectation(kind, logits, ref_logits):
    """(sum over the vocabulary of p * estimate, the KL), of examples of logits."""
    tokens = np.broadcast_to(np.arange(V), logits.shape).astype(np.int32)
    p, q = (
        rlhf.token_logprobs(np.repeat(x[..., None, :], V, axis=-2), tokens)
        for x in (logits, ref_logits)
    )
    estimates = rlhf.kl_estimate(p, q, kind)
    exact = np.float64(logits) - np.logaddexp.reduce(np.float64(logits), -1, keepdims=True)
    other = np.float64(ref_logits) - np.logaddexp.reduce(np.float64(ref_logits), -1, keepdims=True)
    return (np.exp(exact) * estimates).sum(-1), (np.exp(exact) * (exact - other)).sum(-1)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@given(logits=floats(2, 3, V, size=3.0))
def test_the_expectation_of_k1_and_k3_is_the_kl(kind, logits):
    estimate, kl = expectation(kind, *logits)
    np.testing.assert_allclose(estimate, kl, rtol=1e-5, atol=2e-6)


@given(logits=floats(3, V, size=3.0), direction=floats(3, V, size=1.0))
def test_the_expectation_of_k2_is_the_kl_up_to_third_order(logits, direction):
    for step in (0.2, 0.05):
        ref = (logits + step * direction).astype(np.float32)
        estimate, kl = expectation("k2", logits, ref)
        # Their difference is step^3 / 6 times a third central moment of numbers within [-1, 1],
        # which is below 0.78, and a little of step^4.
        np.testing.assert_array_less(np.abs(estimate - kl), 0.15 * step**3 + 1e-6)


@given(mask=masks, numbers=floats(2, B, T), gamma=st.floats(0.0, 1.0, width=32))
def test_gae_at_lambda_one_is_discounted_returns_less_values(mask, numbers, gamma):
    rewards, values = numbers
    advantages, returns = rlhf.gae(rewards, values, mask, gamma=gamma, lam=1.0)
    steps = np.arange(T) - np.arange(T)[:, None]
    discounts = np.where(steps >= 0, np.float64(gamma) ** np.maximum(steps, 0), 0.0)
    expected = np.where(mask, np.where(mask, rewards, 0.0) @ discounts.T, 0.0)
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(advantages, np.where(mask, expected - values, 0), 1e-5, 2e-5)


@given(mask=masks, numbers=floats(2, B, T), gamma=st.floats(0.0, 1.0, width=32))
def test_gae_at_lambda_zero_is_the_temporal_difference(mask, numbers, gamma):
    rewards, values = numbers
    advantages, _ = rlhf.gae(rewards, values, mask, gamma=gamma, lam=0.0)
    following = np.pad(np.where(mask, values, 0.0), ((0, 0), (0, 1)))[:, 1:]
    expected = np.where(mask, rewards + gamma * following - values, 0.0)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "coefficients"),
    [
        ("ppo_policy_loss", {"clip_range": 0.2}),
        ("kl_penalty_policy_loss", {"kl_coef": 0.7}),
        ("grpo_loss", {"reduction": "token"}),
    ],
)
@given(mask=masks, numbers=floats(2, B, T))
def test_at_equal_policies_the_gradient_is_that_of_reinforce(name, coefficients, mask, numbers):
    logprobs, advantages = numbers
    if name == "grpo_loss":
        advantages = np.broadcast_to(advantages[:, :1], (B, T))
    given_advantages = advantages[:, 0] if name == "grpo_loss" else advantages
    (_, metrics), gradient = with_gradient(name, **coefficients)(
        logprobs, logprobs, given_advantages, mask
    )
    _, expected = with_gradient("reinforce_loss")(logprobs, advantages, mask)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(list(metrics.values()), [key == "ratio" for key in metrics], 1e-6)


@given(mask=masks, numbers=floats(2, B, T, size=1.0), advantages=floats(B))
def test_grpo_over_tokens_is_ppo_with_one_advantage_per_response(mask, numbers, advantages):
    output, gradient = with_gradient("grpo_loss", reduction="token")(*numbers, advantages, mask)
    spread = np.repeat(advantages[:, None], T, axis=1)
    expected = with_gradient("ppo_policy_loss")(*numbers, spread, mask)
    loss, metrics = output
    both = {name: metrics[name] for name in expected[0][1]}
    chex.assert_trees_all_close(((loss, both), gradient), expected, rtol=1e-5, atol=1e-6)
    sides = metrics["clipfrac_low"] + metrics["clipfrac_high"]
    np.testing.assert_allclose(sides, metrics["clipfrac"], rtol=1e-6)


@given(length=st.integers(1, T), numbers=floats(3, B, T, size=1.0), advantages=floats(B))
def test_responses_of_one_length_are_reduced_alike(length, numbers, advantages):
    logprobs, old, ref = numbers
    mask = np.broadcast_to(np.arange(T) < length, (B, T))
    token, sequence, constant = (
        rlhf.grpo_loss(
            logprobs, old, advantages, mask, ref_logprobs=ref, kl_coef=0.1, reduction=reduction
        )
        for reduction in ("token", "sequence", "constant")
    )
    chex.assert_trees_all_close(sequence, token, rtol=1e-5, atol=1e-6)
    # Only the loss of "constant" is over padding too.
    rescaled = constant[0] * T / length, constant[1]
    chex.assert_trees_all_close(rescaled, token, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("responses", [2, 5])
@given(data=st.data())
def test_leave_one_out_advantages_sum_to_zero_and_stretch_the_deviations(responses, data):
    scores = data.draw(floats(3, responses))
    advantages = rlhf.leave_one_out_advantages(scores)
    np.testing.assert_allclose(advantages.sum(axis=1), 0.0, atol=1e-4)
    deviations = np.float64(scores) - np.float64(scores).mean(axis=1, keepdims=True)
    expected = responses / (responses - 1) * deviations
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("responses", [2, 5])
@given(data=st.data())
def test_group_advantages_have_variance_one_but_for_eps(responses, data):
    scores = data.draw(floats(3, responses))
    deviation = np.float64(scores).std(axis=1, ddof=1)
    assume(np.all(deviation > 0.01))
    advantages = np.float64(rlhf.group_advantages(scores))
    np.testing.assert_allclose(advantages.mean(axis=1), 0.0, atol=1e-4)
    variance = advantages.var(axis=1, ddof=1)
    np.testing.assert_allclose(variance, (deviation / (deviation + 1e-4)) ** 2, rtol=1e-3)
    assert np.all((variance > 0.97) & (variance < 1.001))
