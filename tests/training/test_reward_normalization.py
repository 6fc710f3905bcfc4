"""Normalized reward models: mean 0, variance 1, and the same order of responses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import RankingBatch
from rlhf_jax.errors import InputError
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.rollout.shaping import empty_score_stats
from rlhf_jax.training import reward
from rlhf_jax.training.reward import make_stats_step, normalize_scores, score_moments
from tests.models.gpt2_by_loop import hidden_by_loop
from tests.training.test_reward import PAIRS, batch_of


def scores_by_loop(params, config, place):
    """Of the chosen (1) or rejected (2) responses of the pairs."""
    kernel = np.asarray(params["head"]["kernel"], np.float64)
    hidden = [hidden_by_loop(params["model"], config, p[0] + p[place])[-1] for p in PAIRS]
    return np.array(hidden) @ kernel


@pytest.fixture(scope="module")
def add(reward_model):
    return jax.jit(make_stats_step(reward_model))


def _stats(add, params, batches):
    stats = empty_score_stats()
    for batch in batches:
        stats = add(params, stats, batch)
    return stats


@pytest.fixture(scope="module")
def normalized(reward_model, reward_params, add):
    """By batches of two, the last one filled up with an example that is none."""
    batches = [batch_of(PAIRS[:2], 3), batch_of(PAIRS[2:], 3)]
    moments = score_moments(_stats(add, reward_params, batches))
    return normalize_scores(reward_model, reward_params, *moments)


def test_preferred_responses_have_mean_0_and_variance_1(reward_model, reward_params, normalized):
    before, after = (
        scores_by_loop(params, reward_model.config, 1) for params in (reward_params, normalized)
    )
    assert abs(before.mean()) > 0.1
    assert abs(before.std() - 1) > 0.1
    assert after.mean() == pytest.approx(0.0, abs=1e-5)
    assert after.std() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(after, (before - before.mean()) / before.std(), atol=1e-4)


def test_differences_are_divided_by_the_deviation(reward_model, reward_params, normalized):
    (chosen, rejected), after = (
        [scores_by_loop(params, reward_model.config, place) for place in (1, 2)]
        for params in (reward_params, normalized)
    )
    expected = (chosen - rejected) / chosen.std()
    np.testing.assert_allclose(after[0] - after[1], expected, rtol=1e-4, atol=1e-5)


def test_normalizing_twice_is_normalizing_once(reward_model, normalized, add):
    stats = _stats(add, normalized, [batch_of(PAIRS, 4)])
    again = normalize_scores(reward_model, normalized, *score_moments(stats))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), again, normalized
    )


def test_of_rankings_the_best_response_counts(reward_params, add):
    pairs = batch_of(PAIRS, 4)
    rankings = RankingBatch(*reward.sequences_of(pairs))
    expected = _stats(add, reward_params, [pairs])
    for ours, theirs in zip(_stats(add, reward_params, [rankings]), expected, strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_scores_that_do_not_differ_are_refused(reward_params, add):
    head = {"kernel": jnp.zeros_like(reward_params["head"]["kernel"])}
    for params, batch in (
        ({**reward_params, "head": head}, batch_of(PAIRS, 4)),
        (reward_params, batch_of(PAIRS[:1] * 3, 4)),
    ):
        with pytest.raises(InputError, match="responses cannot be normalized, for they do not"):
            score_moments(_stats(add, params, [batch]))
    with pytest.raises(InputError, match="normalize_rows must be at least 2, but is 1"):
        reward.Settings(normalize_rows=1)


def test_the_trained_half_alone_can_be_normalized(reward_model, reward_params, normalized):
    """The frozen half of `split` is not needed, and the embeddings do not move."""
    frozen, trained = reward_model.split(reward_params["model"], 1)
    half = normalize_scores(reward_model, {**reward_params, "model": trained}, 0.5, 2.0)
    full = normalize_scores(reward_model, reward_params, 0.5, 2.0)
    merged = reward_model.merge(frozen, half["model"])
    jax.tree.map(np.testing.assert_array_equal, merged, full["model"])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), normalized, reward_params)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, is_changed in jax.tree_util.tree_leaves_with_path(changed)
        if is_changed
    ]
    assert names == ["head/kernel", "model/ln_f/bias"]


def test_a_bias_of_the_head_is_normalized_too(reward_model, reward_params):
    params = {**reward_params, "head": {**reward_params["head"], "bias": jnp.float32(5.0)}}
    batch = batch_of(PAIRS, len(PAIRS))
    scores = [
        end_scores(reward_model, each, reward.sequences_of(batch))
        for each in (params, normalize_scores(reward_model, params, 3.0, 2.0))
    ]
    np.testing.assert_allclose(scores[1], (scores[0] - 3.0) / 2.0, rtol=1e-4, atol=1e-4)
