"""Divergences of the reference term: the derivatives as written, their limits and extremes."""

import chex
import jax
import numpy as np
import pytest

from rlhf_jax import functional
from rlhf_jax.preference_kinds import DIVERGENCE_KINDS, DIVERGENCES, DPO_KINDS
from tests.functional.preference_by_loop import draw_logprobs

KINDS = sorted({*DIVERGENCE_KINDS} - {"sft"})


def derivative(t, divergence, alpha):
    if divergence == "reverse_kl":
        return np.log(t)
    if divergence == "forward_kl":
        return 1 - 1 / t
    if divergence == "js_divergence":
        return np.log(2 * t / (1 + t))
    return (t ** (alpha - 1) - 1) / (alpha - 1)


def loss(logprobs, divergence, alpha=0.5, kind="sigmoid", **more):
    smoothing = {"exo_pair": 0.1, "robust": 0.2}.get(kind, 0.0)
    return functional.dpo_loss(
        *logprobs,
        kind=kind,
        label_smoothing=smoothing,
        divergence=divergence,
        divergence_alpha=alpha,
        **more,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("divergence", "alpha"),
    [("forward_kl", 0.5), ("js_divergence", 0.5), *[("alpha_divergence", x) for x in (-0.5, 2.0)]],
)
def test_scores_are_the_derivative_at_the_ratio(rng, divergence, alpha, kind):
    """A loss on scores is that of the reverse KL whose log-ratios are these scores."""
    logprobs = draw_logprobs(rng, 4, 5)
    pc, pr, rc, rr = np.float64(logprobs)
    scores = [derivative(np.exp(x), divergence, alpha) for x in (pc - rc, pr - rr)]
    nothing = np.zeros(5, np.float32)
    expected, _ = loss([*np.float32(scores), nothing, nothing], "reverse_kl", kind=kind)
    value, metrics = loss(logprobs, divergence, alpha, kind)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert abs(value - loss(logprobs, "reverse_kl", kind=kind)[0]) > 1e-4
    # Rewards are log-ratios whatever the divergence, as in TRL.
    chex.assert_trees_all_equal(metrics, loss(logprobs, "reverse_kl", kind=kind)[1])


def test_the_family_of_alpha_contains_both_directions_of_kl(rng):
    logprobs = draw_logprobs(rng, 4, 5)
    reverse, forward = (loss(logprobs, name)[0] for name in ("reverse_kl", "forward_kl"))
    for alpha in (1.0, 1 + 1e-7, np.float32(1)):
        assert loss(logprobs, "alpha_divergence", alpha)[0] == reverse
    np.testing.assert_allclose(loss(logprobs, "alpha_divergence", 1.001)[0], reverse, rtol=1e-3)
    np.testing.assert_allclose(loss(logprobs, "alpha_divergence", 0.9999)[0], reverse, rtol=1e-4)
    np.testing.assert_allclose(loss(logprobs, "alpha_divergence", 0.0)[0], forward, rtol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_at_the_reference_the_slope_is_that_of_the_divergence(divergence):
    """-beta / 2 * f''(1) with f''(1) = 1, but 1/2 of Jensen-Shannon's."""
    same = np.full(3, -2.0, np.float32)

    def of_chosen(chosen):
        return loss([chosen, same, same, same], divergence, beta=0.4)[0]

    slope = 0.5 if divergence == "js_divergence" else 1.0
    np.testing.assert_allclose(jax.grad(of_chosen)(same), -0.2 * slope / 3, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("divergence", "alpha"),
    [("forward_kl", 0.5), ("js_divergence", 0.5), *[("alpha_divergence", x) for x in (0.99, 3.0)]],
)
def test_extremes_are_finite(divergence, alpha, kind):
    ratios = np.float32([(x, y) for x in (-1e4, 0.0, 1e4) for y in (-1e4, 0.0, 1e4)])
    ref = np.zeros((2, 1), np.float32)

    def of_policy(policy):
        return loss([policy[:1], policy[1:], *ref], divergence, alpha, kind, beta=1.0)[0]

    chex.assert_tree_all_finite(jax.vmap(jax.value_and_grad(of_policy))(ratios))


@pytest.mark.parametrize("kind", [kind for kind in DPO_KINDS if kind not in DIVERGENCE_KINDS])
def test_kinds_in_which_the_constant_does_not_cancel_refuse_a_divergence(kind):
    with pytest.raises(ValueError, match=f"^divergence must be 'reverse_kl' with kind '{kind}', "):
        functional.dpo_loss(*[np.zeros(2, np.float32)] * 4, kind=kind, divergence="js_divergence")
