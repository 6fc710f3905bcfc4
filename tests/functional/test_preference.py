"""Losses on preferences: loops, the reference point of KTO, masks and parts of batches."""

import chex
import jax
import numpy as np
import pytest

import rlhf_jax as rlhf
from tests.functional.preference_by_loop import (
    KINDS,
    assert_loss_and_metrics,
    dpo_by_loop,
    draw,
    kto_by_loop,
    sigmoid,
)

# --- The formulas, by loops


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("beta", [None, 0.05, 1.5])
@pytest.mark.parametrize(
    ("kind", "label_smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.3), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.4)],
)
def test_dpo_loss_matches_a_loop(rng, kind, label_smoothing, beta, with_lengths):
    logprobs = draw(rng, 4, 6)
    lengths = tuple(rng.integers(1, 9, size=(2, 6))) if with_lengths else None
    given = {} if beta is None else {"beta": beta}
    if label_smoothing:
        given["label_smoothing"] = label_smoothing
    output = rlhf.dpo_loss(*logprobs, kind=kind, lengths=lengths, **given)
    expected = dpo_by_loop(logprobs, beta or 0.1, kind, label_smoothing, lengths)
    assert 0 < expected[1] < 1
    assert_loss_and_metrics(output, expected)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.7, "gamma": 0.0}, {"beta": 3.0, "gamma": 2.5}])
def test_simpo_loss_matches_a_loop(rng, settings):
    chosen, rejected = draw(rng, 2, 6, scale=1.0)
    beta, gamma = settings.get("beta", 2.0), settings.get("gamma", 1.0)
    losses, rewards = [], []
    for c, r in zip(chosen.astype(float), rejected.astype(float), strict=True):
        losses.append(-np.log(sigmoid(beta * c - beta * r - gamma)))
        rewards.append((beta * c, beta * r))
    c, r = np.mean(rewards, axis=0)
    wins = np.mean([c > r for c, r in rewards])
    assert 0 < wins < 1
    assert_loss_and_metrics(
        rlhf.simpo_loss(chosen, rejected, **settings), (np.mean(losses), wins, c - r, c, r)
    )


@pytest.mark.parametrize("settings", [{}, {"beta": 2.0}])
def test_orpo_loss_matches_a_loop(rng, settings):
    chosen, rejected = draw(rng, 2, 6, scale=1.0)
    beta, nll = settings.get("beta", 0.1), 1.7
    losses, rewards = [], []
    for c, r in zip(chosen.astype(float), rejected.astype(float), strict=True):
        odds_c, odds_r = (np.exp(x) / (1 - np.exp(x)) for x in (c, r))
        losses.append(-np.log(sigmoid(np.log(odds_c / odds_r))))
        rewards.append((beta * c, beta * r))
    c, r = np.mean(rewards, axis=0)
    wins = np.mean([c > r for c, r in rewards])
    assert 0 < wins < 1
    assert_loss_and_metrics(
        rlhf.orpo_loss(chosen, rejected, np.float32(nll), **settings),
        (nll + beta * np.mean(losses), wins, c - r, c, r),
    )


@pytest.mark.parametrize("kl", [0.8, 0.0, -2.0])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 2), (0, 3), (3, 0)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.9)])
def test_kto_loss_matches_a_loop(rng, sizes, kl, weights):
    policy, ref = ([draw(rng, size) for size in sizes] for _ in "pr")
    output = rlhf.kto_loss(
        *policy,
        *ref,
        np.float32(kl),
        beta=0.4,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    ratios = [np.float64(p) - r for p, r in zip(policy, ref, strict=True)]
    assert_loss_and_metrics(output, kto_by_loop(*ratios, max(0.0, kl), 0.4, weights))


def test_the_defaults_of_kto_are_the_published_ones(rng):
    arrays = draw(rng, 4, 3)
    expected = kto_by_loop(
        np.float64(arrays[0]) - arrays[2], np.float64(arrays[1]) - arrays[3], 0.5, 0.1, (1, 1)
    )
    assert_loss_and_metrics(rlhf.kto_loss(*arrays, 0.5), expected)


# --- The reference point of KTO


def test_no_gradient_goes_through_the_reference_point_and_it_is_never_negative(rng):
    arrays = draw(rng, 4, 5)

    def loss(kl):
        return rlhf.kto_loss(*arrays, kl, beta=0.5)[0]

    assert loss(1.0) != loss(0.5)
    assert loss(-3.0) == loss(0.0)
    assert jax.grad(loss)(1.0) == 0
    assert jax.grad(loss)(-1.0) == 0


def test_at_the_reference_point_nothing_is_right():
    policy, ref = np.zeros(2, np.float32), np.full(2, -1.0, np.float32)
    loss, metrics = rlhf.kto_loss(policy, policy, ref, ref, 1.0)
    assert (loss, metrics["accuracy"]) == (0.5, 0)


# --- Rows off the mask, parts of batches


@pytest.mark.parametrize("kind", KINDS)
def test_padding_entries_are_as_if_removed(rng, kind):
    logprobs, lengths = draw(rng, 4, 5), rng.integers(1, 9, size=(2, 5))
    mask = np.array([True, True, False, True, False])
    expected = rlhf.dpo_loss(*logprobs[:, mask], kind=kind, lengths=tuple(lengths[:, mask]))
    poisoned = np.where(mask, logprobs, np.nan).astype(np.float32)
    garbage = tuple(np.where(mask, lengths, np.nan).astype(np.float32))

    def loss(logprobs):
        return rlhf.dpo_loss(*logprobs, kind=kind, lengths=garbage, mask=mask)

    output, gradient = jax.value_and_grad(loss, has_aux=True)(poisoned)
    chex.assert_trees_all_close(output, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert np.all(gradient[:, ~mask] == 0)


def test_an_empty_mask_leaves_the_likelihood_of_orpo(rng):
    chosen, rejected = np.full((2, 3), np.nan, np.float32)
    loss, metrics = rlhf.orpo_loss(chosen, rejected, np.float32(1.5), mask=np.zeros(3, bool))
    assert loss == 1.5
    assert set(map(float, metrics.values())) == {0.0}


def test_parts_of_orpo_add_up_when_their_likelihoods_do(rng):
    chosen, rejected = draw(rng, 2, 5)
    complete = rlhf.orpo_loss(chosen, rejected, np.float32(2.0))
    parts = [
        rlhf.orpo_loss(chosen[examples], rejected[examples], np.float32(share), denominator=5)
        for examples, share in ((slice(0, 2), 0.75), (slice(2, 5), 1.25))
    ]
    chex.assert_trees_all_close(jax.tree.map(lambda *x: sum(x), *parts), complete, rtol=1e-6)


@pytest.mark.parametrize("size", [3, 0])
def test_parts_of_kto_with_both_numbers_add_up_whatever_is_in_them(rng, size):
    chosen, rejected = draw(rng, 2, 5), draw(rng, 2, size)
    complete = rlhf.kto_loss(chosen[0], rejected[0], chosen[1], rejected[1], 0.5)
    parts = [
        rlhf.kto_loss(
            chosen[0, of_chosen],
            rejected[0, of_rejected],
            chosen[1, of_chosen],
            rejected[1, of_rejected],
            0.5,
            denominator=(5, size),
        )
        for of_chosen, of_rejected in ((slice(0, 4), slice(0, 0)), (slice(4, 5), slice(0, size)))
    ]
    chex.assert_trees_all_close(jax.tree.map(lambda *x: sum(x), *parts), complete, rtol=1e-6)


def test_one_number_as_the_denominator_of_kto_is_half_of_each_sort(rng):
    arrays = draw(rng, 2, 5), draw(rng, 2, 3)
    (policy_c, ref_c), (policy_r, ref_r) = arrays
    one = rlhf.kto_loss(policy_c, policy_r, ref_c, ref_r, 0.5, denominator=9)
    two = rlhf.kto_loss(policy_c, policy_r, ref_c, ref_r, 0.5, denominator=(4.5, 4.5))
    chex.assert_trees_all_close(one, two, rtol=1e-6)
    complete = rlhf.kto_loss(policy_c, policy_r, ref_c, ref_r, 0.5)
    np.testing.assert_allclose(one[0] * 9, complete[0] * 8, rtol=1e-6)
    np.testing.assert_allclose(one[1]["accuracy"] * 9, complete[1]["accuracy"] * 8, rtol=1e-6)
