"""Losses without pairs, and without a reference: BCO, KTO without its reference point, CPO."""

import chex
import jax
import numpy as np
import pytest

from rlhf_jax import functional
from tests.functional.preference_by_loop import draw_logprobs, sigmoid


def mean_of(losses, chosen, rejected, point, beta):
    """(loss, accuracy, margin, rewards of both sorts) by loops, in float64."""
    right = [x > point for x in chosen] + [x < point for x in rejected]
    rewards = [beta * np.mean(x) if len(x) else 0.0 for x in (chosen, rejected)]
    return np.mean(losses), np.mean(right), rewards[0] - rewards[1], *rewards


def assert_outputs(output, expected):
    loss, metrics = output
    names = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    actual = [loss, *(metrics[name] for name in names)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("delta", [None, -0.3, 0.8])
@pytest.mark.parametrize("sizes", [(5, 2), (0, 3), (3, 0)])
def test_bco_loss_matches_a_loop(rng, sizes, delta):
    policy, ref = ([draw_logprobs(rng, size) for size in sizes] for _ in "pr")
    output = functional.bco_loss(*policy, *ref, delta, beta=0.4)
    chosen, rejected = (np.float64(p) - r for p, r in zip(policy, ref, strict=True))
    shift = 0.4 * np.mean(np.concatenate([chosen, rejected])) if delta is None else delta
    losses = [-np.log(sigmoid(0.4 * x - shift)) for x in chosen]
    losses += [-np.log(sigmoid(shift - 0.4 * x)) for x in rejected]
    assert_outputs(output, mean_of(losses, chosen, rejected, shift / 0.4, 0.4))


def test_no_gradient_goes_through_the_reward_shift(rng):
    arrays = draw_logprobs(rng, 4, 5)

    def loss(chosen, delta):
        return functional.bco_loss(chosen, *arrays[1:], delta)[0]

    mean = 0.1 * np.mean(arrays[:2] - arrays[2:])
    gradient = jax.grad(loss)(arrays[0], None)
    np.testing.assert_allclose(gradient, jax.grad(loss)(arrays[0], mean), rtol=1e-5)
    assert jax.grad(loss, 1)(arrays[0], mean) == 0


def test_one_constant_on_rewards_and_on_the_shift_changes_nothing(rng):
    arrays = draw_logprobs(rng, 4, 5)
    expected, _ = functional.bco_loss(*arrays, 0.5)
    shifted, _ = functional.bco_loss(*(arrays[:2] + np.float32(8)), *arrays[2:], 0.5 + 0.1 * 8)
    np.testing.assert_allclose(shifted, expected, rtol=1e-5)
    of_batch, _ = functional.bco_loss(*arrays)
    shifted, _ = functional.bco_loss(*(arrays[:2] + np.float32(8)), *arrays[2:])
    np.testing.assert_allclose(shifted, of_batch, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(5, 2), (0, 3), (3, 0)])
def test_apo_zero_unpaired_matches_a_loop(rng, sizes):
    policy, ref = ([draw_logprobs(rng, size) for size in sizes] for _ in "pr")
    output = functional.kto_loss(
        *policy,
        *ref,
        kind="apo_zero_unpaired",
        beta=0.4,
        desirable_weight=0.7,
        undesirable_weight=1.9,
    )
    chosen, rejected = (np.float64(p) - r for p, r in zip(policy, ref, strict=True))
    losses = [0.7 * (1 - sigmoid(0.4 * x)) for x in chosen]
    losses += [1.9 * sigmoid(0.4 * x) for x in rejected]
    assert_outputs(output, mean_of(losses, chosen, rejected, 0.0, 0.4))


def test_without_pairs_apo_zero_is_half_of_that_of_pairs(rng):
    """A mean over responses instead of pairs; and that of BCO without a shift is half as well."""
    arrays = draw_logprobs(rng, 4, 5)
    paired, metrics = functional.dpo_loss(*arrays, kind="apo_zero")
    unpaired, others = functional.kto_loss(*arrays, kind="apo_zero_unpaired")
    np.testing.assert_allclose(2 * unpaired, paired, rtol=1e-6)
    chex.assert_trees_all_close(others | {"accuracy": 0}, metrics | {"accuracy": 0}, rtol=1e-5)
    paired, _ = functional.dpo_loss(*arrays, kind="bco_pair")
    np.testing.assert_allclose(2 * functional.bco_loss(*arrays, 0.0)[0], paired, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "more"), [("bco_loss", {}), ("kto_loss", {"kind": "apo_zero_unpaired"})]
)
def test_padding_entries_are_as_if_removed(rng, name, more):
    """With BCO's mean of the batch too."""
    (pc, rc), (pr, rr) = draw_logprobs(rng, 2, 5), draw_logprobs(rng, 2, 4)
    masks = np.array([True, False, True, True, False]), np.array([False, True, True, False])
    loss = getattr(functional, name)
    expected = loss(pc[masks[0]], pr[masks[1]], rc[masks[0]], rr[masks[1]], **more)
    poisoned = [
        np.where(mask, x, np.nan) for mask, x in zip(masks * 2, (pc, pr, rc, rr), strict=True)
    ]

    def of_policy(chosen, rejected):
        return loss(
            chosen, rejected, *poisoned[2:], chosen_mask=masks[0], rejected_mask=masks[1], **more
        )

    output, gradients = jax.value_and_grad(of_policy, (0, 1), has_aux=True)(*poisoned[:2])
    chex.assert_trees_all_close(output, expected, rtol=1e-6)
    for mask, gradient in zip(masks, gradients, strict=True):
        assert np.isfinite(gradient).all()
        assert np.array_equal(gradient != 0, mask)


def test_extremes_are_finite():
    ratios, nothing = np.float32([-1e4, -90.0, 0.0, 90.0, 1e4]), np.zeros(5, np.float32)
    for delta in (None, 0.0, 1e4):
        loss = jax.value_and_grad(
            lambda x, delta=delta: functional.bco_loss(x, x, nothing, nothing, delta, beta=1.0)[0]
        )
        chex.assert_tree_all_finite(loss(ratios))


# --- CPO, SimPO


@pytest.mark.parametrize(
    ("kind", "s"), [("sigmoid", 0.0), ("sigmoid", 0.3), ("hinge", 0), ("ipo", 0)]
)
def test_cpo_loss_matches_a_loop(rng, kind, s):
    chosen, rejected = draw_logprobs(rng, 2, 6)
    losses = []
    for h in np.float64(chosen) - rejected:
        q = sigmoid(0.7 * h)
        losses.append(
            {
                "sigmoid": -(1 - s) * np.log(q) - s * np.log(1 - q),
                "hinge": max(0, 1 - 0.7 * h),
                "ipo": (h - 1 / 1.4) ** 2,
            }[kind]
        )
    output = functional.cpo_loss(
        chosen, rejected, 1.25, beta=0.7, kind=kind, label_smoothing=s, nll_weight=0.4
    )
    rewards = 0.7 * np.mean(np.float64(chosen)), 0.7 * np.mean(np.float64(rejected))
    wins = np.mean(chosen > rejected)
    assert 0 < wins < 1
    assert_outputs(output, (0.5 + np.mean(losses), wins, rewards[0] - rewards[1], *rewards))
    default, _ = functional.cpo_loss(chosen, rejected, 1.25, beta=0.7, kind=kind, label_smoothing=s)
    np.testing.assert_allclose(default - output[0], 0.6 * 1.25, rtol=1e-5)


def test_a_smoothed_simpo_of_swapped_pairs_is_that_of_the_other_margin(rng):
    chosen, rejected = draw_logprobs(rng, 2, 6)
    one, _ = functional.simpo_loss(chosen, rejected, gamma=0.5, label_smoothing=0.2)
    other, _ = functional.simpo_loss(rejected, chosen, gamma=-0.5, label_smoothing=0.8)
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bco_loss", {"denominator": 4}, "delta must be given with a denominator"),
        ("bco_loss", {"delta": np.ones(2)}, "delta must be a single number"),
        ("kto_loss", {}, "kl must be given with kind 'kto', .* kl is None"),
        ("kto_loss", {"kind": "apo_zero_unpaired", "kl": 1.0}, "kl must be given .* kl is given"),
        ("kto_loss", {"kind": "bco"}, "kind must be one of 'kto', 'apo_zero_unpaired', but is"),
        ("cpo_loss", {"nll": 1.0, "kind": "robust"}, "kind must be one of 'sigmoid', 'hinge', 'ip"),
        (
            "cpo_loss",
            {"nll": 1.0, "kind": "ipo", "label_smoothing": 0.1},
            "label_smoothing must be 0 with kind 'ipo'",
        ),
    ],
)
def test_what_a_loss_does_not_support_is_named(name, arguments, message):
    count = 2 if name == "cpo_loss" else 4
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(functional, name)(*[np.zeros(2, np.float32)] * count, **arguments)
