"""Advantages of groups, length penalty and pass@k against loops."""

import itertools

import jax
import numpy as np
import pytest

import rlhf_jax as rlhf


def leave_one_out_by_loop(scores):
    advantages = np.zeros(scores.shape)
    for b, row in enumerate(np.float64(scores)):
        for i, score in enumerate(row):
            advantages[b, i] = score - np.mean([row[j] for j in range(len(row)) if j != i])
    return advantages


def group_by_loop(scores, scale, eps):
    advantages = np.zeros(scores.shape)
    for b, row in enumerate(np.float64(scores)):
        mean = sum(row) / len(row)
        deviation = (sum((x - mean) ** 2 for x in row) / (len(row) - 1)) ** 0.5
        for i, score in enumerate(row):
            advantages[b, i] = (score - mean) / (deviation + eps) if scale else score - mean
    return advantages


@pytest.mark.parametrize("responses", [2, 5])
def test_leave_one_out_advantages_match_a_loop(rng, responses):
    scores = rng.normal(3.0, 2.0, size=(4, responses)).astype(np.float32)
    advantages = rlhf.leave_one_out_advantages(scores)
    np.testing.assert_allclose(advantages, leave_one_out_by_loop(scores), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("responses", [2, 5])
@pytest.mark.parametrize(("scale", "eps"), [(True, None), ("group", 0.5), (False, 0.5)])
def test_group_advantages_match_a_loop(rng, responses, scale, eps):
    scores = rng.normal(3.0, 2.0, size=(4, responses)).astype(np.float32)
    options = {} if eps is None else {"scale": scale, "eps": eps}
    advantages = rlhf.group_advantages(scores, **options)
    expected = group_by_loop(scores, scale, 1e-4 if eps is None else eps)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", [0.0, 0.1, -3.7, 12345.678, 1e10])
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (rlhf.leave_one_out_advantages, {}),
        (rlhf.group_advantages, {}),
        (rlhf.group_advantages, {"eps": 0.0}),
        (rlhf.group_advantages, {"scale": False}),
    ],
)
def test_equal_scores_give_exactly_zero_and_finite_gradients(function, options, score):
    scores = np.full((1, 7), score, np.float32)
    weights = np.arange(7, dtype=np.float32)

    def weighted(scores):
        advantages = function(scores, **options)
        return (weights * advantages).sum(), advantages

    gradient, advantages = jax.grad(weighted, has_aux=True)(scores)
    np.testing.assert_array_equal(advantages, np.zeros((1, 7)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("function", [rlhf.leave_one_out_advantages, rlhf.group_advantages])
def test_gradients_of_group_advantages_are_those_of_the_loop(rng, function):
    scores, weights = rng.normal(size=(2, 2, 3)).astype(np.float32)
    by_loop = {
        rlhf.leave_one_out_advantages: leave_one_out_by_loop,
        rlhf.group_advantages: lambda x: group_by_loop(x, True, 1e-4),
    }[function]
    gradient = jax.grad(lambda x: (weights * function(x)).sum())(scores)
    for index in np.ndindex(scores.shape):
        step = np.zeros(scores.shape)
        step[index] = 1e-5
        slope = (by_loop(scores + step) - by_loop(scores - step)) / 2e-5
        np.testing.assert_allclose(gradient[index], (weights * slope).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [rlhf.leave_one_out_advantages, rlhf.group_advantages])
def test_a_single_response_is_named_as_too_few(function):
    message = r"^scores must be float\[B, K\] with K >= 2, but is float32\[3, 1\]\."
    with pytest.raises(ValueError, match=message):
        function(np.zeros((3, 1), np.float32))


def normalized_by_loop(values, eps):
    """The numbers, less their mean, over their deviation plus eps."""
    mean = sum(values) / len(values)
    deviation = (sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)) ** 0.5
    return [(x - mean) / (deviation + eps) if deviation else 0.0 for x in values]


@pytest.fixture
def masked_scores(rng):
    """Scores [4, 5], with NaN where the mask of those that count is False."""
    mask = np.arange(5) < np.array([5, 3, 1, 0])[:, None]
    mask[0, 2] = False
    return np.where(mask, rng.normal(3.0, 2.0, size=mask.shape), np.nan).astype(np.float32), mask


def test_responses_without_a_score_do_not_count(masked_scores):
    scores, mask = masked_scores
    outputs = {
        "rloo": rlhf.leave_one_out_advantages(scores, mask),
        "group": rlhf.group_advantages(scores, mask),
        "none": rlhf.group_advantages(scores, mask, scale="none"),
    }
    for row, real in enumerate(mask):
        kept = scores[row, real].astype(np.float64)
        others = [
            np.mean(np.delete(kept, i)) if kept.size > 1 else kept[i] for i in range(kept.size)
        ]
        expected = {
            "rloo": kept - others,
            "group": normalized_by_loop(kept, 1e-4) if kept.size else [],
            "none": kept - sum(kept) / max(kept.size, 1),
        }
        for name, output in outputs.items():
            np.testing.assert_allclose(
                output[row, real], expected[name], rtol=1e-5, atol=1e-6, err_msg=name
            )
            assert not np.any(output[row, ~real])


def test_the_scale_of_the_batch_is_one_deviation_for_all(masked_scores):
    scores, mask = masked_scores
    advantages = rlhf.group_advantages(scores, mask, scale="batch", eps=0.3)
    deviation = np.std(np.float64(scores[mask]), ddof=1)
    centred = rlhf.group_advantages(scores, mask, scale="none")
    np.testing.assert_allclose(advantages, centred / (deviation + 0.3), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="^scale must be one of 'group', 'batch', 'none', but is"):
        rlhf.group_advantages(scores, mask, scale="rows")


def test_normalized_advantages_match_a_loop(rng, ragged_mask):
    advantages = rng.normal(3.0, 2.0, size=ragged_mask.shape).astype(np.float32)
    output = rlhf.normalize_advantages(advantages, ragged_mask)
    expected = normalized_by_loop([float(x) for x in advantages[ragged_mask]], 1e-4)
    np.testing.assert_allclose(output[ragged_mask], expected, rtol=1e-5, atol=1e-6)
    # One response to each prompt, all with the same score, of which the mean is rounded.
    equal = rlhf.normalize_advantages(np.full((7, 1), 0.1, np.float32), np.ones((7, 1), bool))
    np.testing.assert_array_equal(equal, np.zeros((7, 1)))


def test_decoupled_advantages_match_a_loop(rng):
    scores = (rng.normal(size=(3, 4, 2)) * [1.0, 50.0]).astype(np.float32)
    mask = rng.random(scores.shape) < 0.7
    mask[1, 0], mask[2, :, 1] = False, np.arange(4) == 1
    weights = np.float32([1.0, 0.25])
    totals = np.zeros((3, 4))
    for prompt, which in itertools.product(range(3), range(2)):
        real = mask[prompt, :, which]
        own = normalized_by_loop(scores[prompt, real, which].astype(np.float64), 1e-4)
        totals[prompt, real] += weights[which] * np.array(own)
    real = mask.any(axis=2)
    expected = np.zeros((3, 4))
    expected[real] = normalized_by_loop(totals[real], 1e-4)
    poisoned = np.where(mask, scores, np.nan).astype(np.float32)
    output = rlhf.decoupled_advantages(poisoned, weights, mask)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_pass_at_k_is_the_share_of_the_draws_with_a_success():
    for samples, k in ((5, 1), (5, 3), (4, 4)):
        shares = [
            np.mean([any(i < successes for i in draw) for draw in draws])
            for successes in range(samples + 1)
            for draws in [list(itertools.combinations(range(samples), k))]
        ]
        successes = np.arange(samples + 1, dtype=np.int32)
        np.testing.assert_allclose(rlhf.pass_at_k(successes, samples, k), shares, rtol=1e-6)
    with pytest.raises(ValueError, match="^k must be at most the number of samples, 4, but is 5"):
        rlhf.pass_at_k(successes, 4, 5)


def test_without_a_buffer_the_penalty_is_a_step():
    penalty = rlhf.overlong_penalty(np.int32([0, 7, 8, 9]), max_length=8, buffer=0)
    np.testing.assert_array_equal(penalty, [0, 0, 0, -1])
