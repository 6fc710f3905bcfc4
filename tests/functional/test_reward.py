"""Losses of reward models: a loop, TRL's numbers, extremes."""

import chex
import jax
import numpy as np
import pytest

import rlhf_jax as rlhf


def pairwise_by_loop(chosen, rejected, margin, center_coef):
    losses = []
    for c, r, m in zip(chosen, rejected, margin, strict=True):
        preferred = 1 / (1 + np.exp(-(float(c) - float(r) - m)))
        losses.append(-np.log(preferred) + center_coef * (float(c) + float(r)) ** 2)
    return np.mean(losses)


@pytest.mark.parametrize("center_coef", [0.0, 0.2])
@pytest.mark.parametrize("margin", [0.0, 0.7, np.float32([0.0, 0.1, -0.3, 2.0])])
def test_pairwise_loss_matches_a_loop(rng, margin, center_coef):
    chosen, rejected = rng.normal(size=(2, 4)).astype(np.float32)
    loss, metrics = rlhf.pairwise_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    margins = np.broadcast_to(margin, 4)
    expected = pairwise_by_loop(chosen, rejected, margins, center_coef)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(chosen > rejected))
    np.testing.assert_allclose(metrics["margin"], np.mean(chosen - rejected), rtol=1e-5)


@pytest.mark.parametrize("index", range(6))
def test_pairwise_loss_is_trls(golden, index):
    case = golden("reward_tokenwise")[f"pairwise{index}"]
    margin = case["margin"] if case["hp/use_margin"] else 0.0

    def loss(chosen, rejected):
        return rlhf.pairwise_loss(
            chosen, rejected, margin=margin, center_coef=float(case["hp/center_coef"])
        )

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        case["chosen"], case["rejected"]
    )
    outputs = [value, metrics["accuracy"], metrics["margin"], *gradients]
    names = ["loss", "accuracy", "margin", "grad_chosen", "grad_rejected"]
    for output, name in zip(outputs, names, strict=True):
        np.testing.assert_allclose(output, case[f"out/{name}"], rtol=1e-5, atol=1e-7, err_msg=name)


def test_rows_off_the_mask_are_inert(rng):
    chosen, rejected, margin = rng.normal(size=(3, 5)).astype(np.float32)
    mask = np.array([True, True, False, True, False])
    real = (chosen[mask], rejected[mask])
    expected = rlhf.pairwise_loss(*real, margin=margin[mask], center_coef=0.1)
    poisoned = [np.where(mask, x, np.nan).astype(np.float32) for x in (chosen, rejected, margin)]

    def loss(chosen, rejected):
        return rlhf.pairwise_loss(chosen, rejected, margin=poisoned[2], center_coef=0.1, mask=mask)

    output, gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*poisoned[:2])
    chex.assert_trees_all_close(output, expected, rtol=1e-6)
    for gradient in gradients:
        assert np.all(gradient[mask] != 0)
        assert np.all(gradient[~mask] == 0)
    nothing, _ = rlhf.pairwise_loss(*poisoned[:2], mask=np.zeros(5, bool))
    assert nothing == 0


@pytest.mark.parametrize("difference", [-1e4, -90.0, 90.0, 1e4])
def test_extreme_scores_have_finite_losses_and_gradients(difference):
    chosen, rejected = np.float32([difference]), np.zeros(1, np.float32)
    loss = lambda x: rlhf.pairwise_loss(x, rejected)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(chosen)
    np.testing.assert_allclose(value, max(-difference, 0.0), atol=1e-6)
    np.testing.assert_allclose(gradient, [-1.0 if difference < 0 else 0.0], atol=1e-6)


def test_a_tie_is_no_success():
    scores = np.ones(2, np.float32)
    assert rlhf.pairwise_loss(scores, scores)[1]["accuracy"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("margin", np.zeros(3, np.float32)), ("margin", np.zeros(2, int)), ("mask", np.ones(2))],
)
def test_wrong_keywords_are_named(name, value):
    scores = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=f"^{name} must be .*B.* but is "):
        rlhf.pairwise_loss(scores, scores, **{name: value})


def test_scores_that_are_no_arrays_are_named():
    with pytest.raises(ValueError, match=r"^chosen must be float\[B\], but is .* \(no array\)"):
        rlhf.pairwise_loss([1.0], [2.0])
