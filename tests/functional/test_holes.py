"""Masks with holes, such as tool output inside a response: as if those tokens were not there."""

import chex
import jax
import numpy as np
import pytest

import rlhf_jax as rlhf
from tests.functional.case import B, T
from tests.functional.cases import make_cases
from tests.functional.test_all import call, function_of

CASES = {
    name: case
    for name, case in make_cases(0).items()
    if case.arrays.get("mask", np.zeros(0)).shape == (B, T)
}


def test_advantages_and_returns_are_carried_across_a_hole():
    mask = np.array([[True, False, False, True]])
    rewards, values = np.float32([[0, np.nan, 9, 1]]), np.float32([[0.5, 9, np.nan, 0.5]])
    advantages, returns = rlhf.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, [[0.475, 0, 0, 0.5]])
    np.testing.assert_allclose(returns, [[0.975, 0, 0, 1.0]])
    np.testing.assert_allclose(rlhf.rewards_to_go(rewards, mask, gamma=0.5), [[0.5, 0, 0, 1]])


@pytest.mark.parametrize("name", CASES)
def test_real_tokens_moved_to_the_front_change_nothing(rng, name):
    case, function = CASES[name], function_of(name, rlhf)
    mask = rng.random((B, T)) < 0.6
    mask[1] = False
    order = np.argsort(~mask, axis=1, kind="stable")

    def in_front(x):
        has_tokens = np.ndim(x) >= 2 and np.shape(x)[:2] == (B, T)
        return np.stack([row[own] for row, own in zip(x, order, strict=True)]) if has_tokens else x

    assert (in_front(mask) != mask).any()
    arrays = {**case.arrays, "mask": mask}
    with_holes = call(function, case, arrays)
    expected = call(function, case, {key: in_front(x) for key, x in arrays.items()})
    moved = jax.tree.map(in_front, jax.tree.map(np.asarray, with_holes))
    chex.assert_trees_all_close(moved, expected, rtol=1e-5, atol=1e-6)


def test_a_response_keeps_its_last_score_across_a_hole():
    """The responses differ by the hole alone; from there the scores are (3, 1), then (3, 3)."""
    tokens = np.zeros((1, 3), np.int32)
    masks = np.array([[True, True, True]]), np.array([[True, False, True]])
    scores = np.float32([[0, 3, 3]]), np.float32([[1, np.nan, 3]])
    loss, metrics = rlhf.tokenwise_pairwise_loss(*scores, tokens, tokens, *masks)
    np.testing.assert_allclose(loss, np.mean(np.log1p(np.exp([-2.0, 0.0]))), rtol=1e-6)
    assert metrics["rejected_end_scores"] == 3
