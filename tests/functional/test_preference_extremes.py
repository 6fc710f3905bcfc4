"""Losses on preferences at extreme values, and the messages about wrong arguments."""

import jax
import numpy as np
import pytest

import rlhf_jax as rlhf
from rlhf_jax import functional
from tests.functional.preference_by_loop import KINDS, draw, sigmoid


@pytest.mark.parametrize("difference", [-1e4, -90.0, 0.0, 90.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_log_ratios_have_finite_losses_and_gradients(kind, difference):
    policy, nothing = np.float32([difference]), np.zeros(1, np.float32)
    smoothing = {"label_smoothing": 0.25} if kind == "robust" else {}

    def loss(policy):
        return rlhf.dpo_loss(policy, nothing, nothing, nothing, beta=1.0, kind=kind, **smoothing)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(policy)
    soft = np.logaddexp(0.0, -difference)
    expected = {
        "sigmoid": soft,
        "hinge": max(0.0, 1 - difference),
        "ipo": (difference - 0.5) ** 2,
        "robust": (0.75 * soft - 0.25 * (soft + difference)) / 0.5,
    }
    np.testing.assert_allclose(value, expected[kind], rtol=1e-6, atol=1e-6)
    assert np.isfinite([*gradient, *metrics.values()]).all()
    if kind == "sigmoid" and difference:
        np.testing.assert_allclose(gradient, [-1.0 if difference < 0 else 0.0], atol=1e-6)


@pytest.mark.parametrize("difference", [-1e4, -90.0, 90.0, 1e4])
def test_extremes_of_simpo_and_kto_are_finite(difference):
    policy, nothing = np.float32([difference]), np.zeros(1, np.float32)
    value, gradient = jax.value_and_grad(lambda x: rlhf.simpo_loss(x, nothing, gamma=0.0)[0])(
        policy
    )
    np.testing.assert_allclose(value, max(0.0, -2 * difference), atol=1e-6)
    np.testing.assert_allclose(gradient, [-2.0 if difference < 0 else 0.0], atol=1e-6)

    def kto(policy):
        return rlhf.kto_loss(policy, policy, nothing, nothing, 0.0, beta=1.0)[0]

    value, gradient = jax.value_and_grad(kto)(policy)
    np.testing.assert_allclose(value, 0.5)  # one of the two is all wrong
    np.testing.assert_allclose(gradient, [0.0], atol=1e-6)


def test_at_the_corner_of_the_hinge_there_is_no_gradient():
    """As in TRL, whose ReLU has none there; jnp.maximum would give half of one."""
    nothing = np.zeros(1, np.float32)

    def loss(policy):
        return rlhf.dpo_loss(policy, nothing, nothing, nothing, beta=0.5, kind="hinge")[0]

    assert jax.grad(loss)(np.float32([2.0])) == 0
    assert jax.grad(loss)(np.float32([1.99])) == -0.5


CERTAIN = [0.0, -1e-30, -1e-9, -(2.0**-23), -1e-5, -1e-3, -0.5, -1.0, -20.0, -90.0, -1e3, -1e4]


@pytest.mark.parametrize("chosen", CERTAIN)
@pytest.mark.parametrize("rejected", CERTAIN)
def test_orpo_is_finite_for_certain_and_for_impossible_responses(chosen, rejected):
    def loss(chosen, rejected):
        return rlhf.orpo_loss(chosen, rejected, np.float32(0.0), beta=1.0)[0]

    value, gradients = jax.value_and_grad(loss, (0, 1))(
        np.float32([chosen]), np.float32([rejected])
    )
    clamped = np.float64([min(x, -(2.0**-23)) for x in (chosen, rejected)])
    log_odds = clamped - np.log(-np.expm1(clamped))
    np.testing.assert_allclose(
        value, np.logaddexp(0.0, log_odds[1] - log_odds[0]), rtol=2e-6, atol=1e-7
    )
    wrong = sigmoid(np.clip(log_odds[1] - log_odds[0], -500, 500))
    expected = [-wrong / -np.expm1(clamped[0]), wrong / -np.expm1(clamped[1])]
    for gradient, slope, x in zip(gradients, expected, (chosen, rejected), strict=True):
        if x > -(2.0**-23):  # constant there
            assert gradient[0] == 0
        elif x < -(2.0**-23):
            np.testing.assert_allclose(gradient[0], slope, rtol=2e-5, atol=1e-7)
        assert np.isfinite(gradient).all()


def test_equal_responses_are_no_success(rng):
    arrays = draw(rng, 2, 4)
    chosen, ref = arrays
    for output in (
        rlhf.dpo_loss(chosen, chosen, ref, ref),
        rlhf.simpo_loss(chosen, chosen),
        rlhf.orpo_loss(chosen, chosen, 0.0),
    ):
        assert output[1]["accuracy"] == 0
        assert output[1]["margin"] == 0


# --- Messages


def four(size=2):
    return [np.zeros(size, np.float32)] * 4


@pytest.mark.parametrize("label_smoothing", [0.1, 1])
@pytest.mark.parametrize("kind", ["hinge", "ipo"])
def test_a_label_smoothing_that_would_do_nothing_is_refused(kind, label_smoothing):
    with pytest.raises(ValueError, match=f"^label_smoothing must be 0 with kind '{kind}', .* but"):
        functional.dpo_loss(*four(), kind=kind, label_smoothing=label_smoothing)
    functional.dpo_loss(*four(), kind=kind, label_smoothing=0)


@pytest.mark.parametrize("kind", ["hinge", "ipo"])
def test_a_traced_one_shows_in_the_loss(kind):
    assert np.isnan(rlhf.dpo_loss(*four(), kind=kind, label_smoothing=0.1)[0])
    assert np.isfinite(rlhf.dpo_loss(*four(), kind=kind, label_smoothing=0.0)[0])


@pytest.mark.parametrize("label_smoothing", [0.5, 0.7, 1, -0.1, np.float32(0.5)])
def test_robust_needs_a_label_smoothing_below_a_half(label_smoothing):
    with pytest.raises(ValueError, match=r"^label_smoothing must be .* below 0\.5 .*'robust'"):
        functional.dpo_loss(*four(), kind="robust", label_smoothing=label_smoothing)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"^kind must be one of 'sigmoid', .*, but is 'exo'\.$"):
        functional.dpo_loss(*four(), kind="exo")


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.ones((3, 2), int), "lengths must be a pair, "),
        ((np.ones(2, int),) * 3, "lengths must be a pair, "),
        ((np.ones(2, int), np.ones(3, int)), r"lengths\[1\] must be int\[B\] with B = 2, but is "),
        ((np.ones(2, bool), np.ones(2, int)), r"lengths\[0\] must be int\[B\] .* but is bool\[2\]"),
        ((3, 4), r"lengths\[0\] must be int\[B\] .* but is 3 \(no array\)"),
    ],
)
def test_wrong_lengths_are_named(lengths, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        functional.dpo_loss(*four(), lengths=lengths)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("dpo_loss", {"mask": np.ones(2)}, r"mask must be bool\[B\] with B = 2, but is float64"),
        (
            "kto_loss",
            {"chosen_mask": np.ones(3, bool)},
            r"chosen_mask must be bool\[C\] with C = 2",
        ),
        ("kto_loss", {"rejected_mask": np.ones(2, int)}, r"rejected_mask must be bool\[R\]"),
        ("kto_loss", {"kl": np.zeros(2)}, r"kl must be a single number, but is float64\[2\]"),
        ("kto_loss", {"ref_rejected": np.zeros(3)}, r"ref_rejected must be float\[R\] with R = 2"),
        ("orpo_loss", {"nll": np.ones(2)}, r"nll must be a single number, but is float64\[2\]"),
        ("kto_loss", {"denominator": (1, 2, 3)}, "denominator must be a single number or a pair"),
        ("orpo_loss", {"policy_rejected": [0.0]}, r"policy_rejected must be float\[B\] with B = 2"),
        ("simpo_loss", {"policy_chosen": np.zeros((2, 2))}, r"policy_chosen must be float\[B\], b"),
    ],
)
def test_wrong_arguments_are_named(function, arguments, message):
    names = ["policy_chosen", "policy_rejected"]
    if function in ("dpo_loss", "kto_loss"):
        names += ["ref_chosen", "ref_rejected"]
    given = dict.fromkeys(names, np.zeros(2, np.float32))
    given |= {"orpo_loss": {"nll": 0.0}, "kto_loss": {"kl": 0.0}}.get(function, {})
    getattr(functional, function)(**given)
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(functional, function)(**given | arguments)
