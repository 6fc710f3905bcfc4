"""The kinds of dpo_loss: loops, slopes where policy and reference agree, limits, extremes."""

import itertools

import chex
import jax
import numpy as np
import pytest

from rlhf_jax import functional
from rlhf_jax.preference_kinds import BATCH_KINDS, DPO_KINDS, SMOOTHED_KINDS
from tests.functional.preference_by_loop import sigmoid

SMOOTHING = {"robust": 0.3, "exo_pair": 0.05, "aot": 0.1, "aot_unpaired": 0.2}
PAIR_KINDS = [kind for kind in DPO_KINDS if kind != "sft"]
# What one response of a pair adds to both of its log-ratios cancels.
OF_DIFFERENCES = ("sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop")
METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")


def dpo(logprobs, kind, **more):
    more = {"label_smoothing": SMOOTHING.get(kind, 0.0)} | more
    return functional.dpo_loss(*logprobs, kind=kind, **more)


def draw(rng, *shape):
    """Multiples of 1/64, of which float32 has exact sums."""
    return np.round(64 * rng.normal(scale=2.0, size=shape) - 256).astype(np.float32) / 64


def kind_by_loop(kind, c, r, beta, s, tau=0.05):
    """One pair's loss by the formula as it is written, in float64."""
    h = c - r
    q, m = sigmoid(beta * h), sigmoid(beta * h / tau)
    good, bad = sigmoid(beta * c), sigmoid(beta * r)
    formulas = {
        "sigmoid": lambda: -(1 - s) * np.log(q) - s * np.log(1 - q),
        "robust": lambda: (-(1 - s) * np.log(q) + s * np.log(1 - q)) / (1 - 2 * s),
        "hinge": lambda: max(0.0, 1 - beta * h),
        "ipo": lambda: (h - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: q * np.log(q / (1 - s)) + (1 - q) * np.log((1 - q) / s),
        "nca_pair": lambda: -np.log(good) - np.log(1 - good) / 2 - np.log(1 - bad) / 2,
        "bco_pair": lambda: -np.log(good) - np.log(1 - bad),
        "sppo_hard": lambda: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - good + bad,
        "apo_down": lambda: good + 1 - q,
        "discopop": lambda: -np.log(q) * (1 - m) + np.exp(-beta * h) * m,
    }
    return formulas[kind]()


def loss_by_loop(logprobs, kind, beta, s, lengths=None):
    pc, pr, rc, rr = np.float64(logprobs)
    if lengths is not None:
        pc, rc = pc / lengths[0], rc / lengths[0]
        pr, rr = pr / lengths[1], rr / lengths[1]
    if kind == "aot":
        pairs = zip(sorted(pc - pr), sorted(rc - rr), strict=True)
    elif kind == "aot_unpaired":
        pairs = zip(sorted(pc - rc), sorted(pr - rr), strict=True)
    else:
        pairs = zip(pc - rc, pr - rr, strict=True)
    kind = "sigmoid" if kind in BATCH_KINDS else kind
    return np.mean([kind_by_loop(kind, c, r, beta, s) for c, r in pairs])


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_each_kind_and_its_gradient_match_a_loop(rng, kind, with_lengths):
    logprobs = draw(rng, 4, 6)
    lengths = tuple(rng.integers(1, 4, size=(2, 6))) if with_lengths else None
    s = SMOOTHING.get(kind, 0.2 if kind == "sigmoid" else 0.0)
    step = 1e-5
    for beta in (0.1, 0.7):
        (loss, metrics), gradient = jax.value_and_grad(dpo, has_aux=True)(
            logprobs, kind, beta=beta, label_smoothing=s, lengths=lengths
        )
        assert sorted(metrics) == sorted(METRICS)
        np.testing.assert_allclose(loss, loss_by_loop(logprobs, kind, beta, s, lengths), rtol=1e-5)
        slopes = np.zeros((4, 6))
        for place in itertools.product(range(4), range(6)):
            shift = np.zeros((4, 6))
            shift[place] = step
            above, below = (
                loss_by_loop(np.float64(logprobs) + sign * shift, kind, beta, s, lengths)
                for sign in (1, -1)
            )
            slopes[place] = (above - below) / (2 * step)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6)


def test_sft_is_the_given_likelihood_with_the_metrics_of_the_pairs(rng):
    logprobs = draw(rng, 4, 5)
    loss, metrics = dpo(logprobs, "sft", nll=1.25)
    assert loss == 1.25
    chex.assert_trees_all_equal(metrics, dpo(logprobs, "sigmoid")[1])


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_slopes_where_policy_and_reference_agree(rng, kind):
    """By c and by r, of three pairs: the start of training."""
    beta, s, tau = 0.4, SMOOTHING.get(kind, 0.0), 0.05
    discopop = beta * (-0.75 + (1 - np.log(2)) / (4 * tau))
    of_difference = {
        "sigmoid": -beta / 2,
        "robust": -beta / 2 / (1 - 2 * s),
        "hinge": -beta,
        "ipo": -1 / beta,
        "exo_pair": -beta / 4 * np.log((1 - s) / s) if s else None,
        "aot": -beta / 2 * (1 - 2 * s),
        "aot_unpaired": -beta / 2 * (1 - 2 * s),
        "discopop": discopop,
    }
    of_both = {
        "nca_pair": (-beta / 4, beta / 4),
        "bco_pair": (-beta / 2, beta / 2),
        "sppo_hard": (-1 / beta, 1 / beta),
        "apo_zero": (-beta / 4, beta / 4),
        "apo_down": (0.0, beta / 4),
    }
    expected = of_both.get(kind) or (of_difference[kind], -of_difference[kind])
    ref = draw(rng, 2, 3)

    def loss(policy):
        return dpo([*policy, *ref], kind, beta=beta)[0]

    gradient = jax.grad(loss)(ref)
    np.testing.assert_allclose(gradient, np.outer(expected, np.ones(3)) / 3, rtol=1e-5, atol=1e-7)


def test_discopop_lowers_margins_at_the_start_as_published():
    """Its slope there is positive, and its minimum at a negative margin, unlike that of DPO."""
    zero = np.zeros(1, np.float32)

    def loss(margin):
        return dpo([margin, zero, zero, zero], "discopop", beta=1.0)[0]

    assert 0.78 < jax.grad(lambda margin: loss(margin))(zero)[0] < 0.79
    margins = np.linspace(-0.5, 0.5, 101, dtype=np.float32)
    losses = [float(loss(margin[None])) for margin in margins]
    lower = margins[int(np.argmin(losses[:51]))]
    assert -0.2 < lower < -0.05
    assert min(losses[:51]) < losses[50]


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_the_limit_of_a_large_beta(rng, kind):
    """Only the signs of c, r and h are left; divided by beta where the loss grows with it."""
    logprobs = draw(rng, 4, 6)
    pc, pr, rc, rr = np.float64(logprobs)
    c, r = pc - rc, pr - rr
    h = c - r
    assert np.all(c * r * h != 0)
    beta, s = 1e4, SMOOTHING.get(kind, 0.0)
    right, swapped = np.maximum(-h, 0), np.maximum(h, 0)
    limits = {
        "sigmoid": beta * right,
        "robust": beta * ((1 - s) * right - s * swapped) / (1 - 2 * s),
        "hinge": beta * right + (h < 0),
        "ipo": h**2,
        "exo_pair": np.where(h > 0, -np.log(1 - s), -np.log(s or 1)),
        "nca_pair": beta * (np.maximum(-c, 0) + np.maximum(c, 0) / 2 + np.maximum(r, 0) / 2),
        "bco_pair": beta * (np.maximum(-c, 0) + np.maximum(r, 0)),
        "sppo_hard": c**2 + r**2,
        "apo_zero": (c < 0).astype(float) + (r > 0),
        "apo_down": (c > 0).astype(float) + (h < 0),
        "discopop": beta * right,
    }
    if kind in BATCH_KINDS:
        above, below = (
            (np.sort(pc - pr), np.sort(rc - rr)) if kind == "aot" else map(np.sort, (c, r))
        )
        d = above - below
        limits[kind] = beta * ((1 - s) * np.maximum(-d, 0) + s * np.maximum(d, 0))
    loss, _ = dpo(logprobs, kind, beta=beta)
    np.testing.assert_allclose(loss, np.mean(limits[kind]), rtol=2e-4)


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_constants_cancel_where_they_should(rng, kind):
    """One on policy and reference of a response everywhere, but in aot's sorted margins only if it
    is the same for all pairs; one on both responses under the policy only in kinds of h.
    """
    pc, pr, rc, rr = draw(rng, 4, 6)
    expected, _ = dpo((pc, pr, rc, rr), kind)
    constants = 16.0 if kind == "aot" else np.round(8 * rng.normal(size=6)).astype(np.float32)
    both, _ = dpo((pc + constants, pr, rc + constants, rr), kind)
    np.testing.assert_allclose(both, expected, rtol=1e-6)
    policy, _ = dpo((pc + constants, pr + constants, rc, rr), kind)
    is_invariant = kind in OF_DIFFERENCES or kind == "aot"
    if not is_invariant and kind != "aot_unpaired":
        assert abs(policy - expected) > 1e-3
    elif is_invariant:
        np.testing.assert_allclose(policy, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "exo_pair", "aot", "aot_unpaired"])
def test_swapped_pairs_are_pairs_with_the_other_smoothing(rng, kind):
    pc, pr, rc, rr = draw(rng, 4, 6)
    one, metrics = dpo((pc, pr, rc, rr), kind, label_smoothing=0.2)
    other, swapped = dpo((pr, pc, rr, rc), kind, label_smoothing=0.8)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(swapped["margin"], -metrics["margin"], rtol=1e-6)
    np.testing.assert_allclose(swapped["accuracy"], 1 - metrics["accuracy"], rtol=1e-6)
    assert swapped["chosen_reward"] == metrics["rejected_reward"]


@pytest.mark.parametrize("kind", ["bco_pair", "sppo_hard", "apo_zero"])
def test_exchanging_responses_and_signs_changes_nothing(rng, kind):
    """The loss is symmetric in the chosen log-ratio and minus the rejected one."""
    pc, pr, rc, rr = draw(rng, 4, 6)
    one, _ = dpo((pc, pr, rc, rr), kind)
    other, _ = dpo((rr, rc, pr, pc), kind)
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_extreme_log_ratios_have_finite_losses_and_gradients(kind):
    """Every sign of 1e4, and 90, of both responses, alone."""
    ratios = np.float32(list(itertools.product((-1e4, -90.0, 0.0, 90.0, 1e4), repeat=2)))
    ref = np.zeros((2, 1), np.float32)

    def loss(policy):
        return dpo([policy[:1], policy[1:], *ref], kind, beta=1.0)[0]

    losses, gradients = jax.vmap(jax.value_and_grad(loss))(ratios)
    chex.assert_tree_all_finite((losses, gradients))
    assert np.any(gradients != 0)
    if kind == "discopop":
        h = ratios[:, 0] - ratios[:, 1]
        expected = np.maximum(-h, 0) + np.where(h == 0, (np.log(2) + 1) / 2, 0)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_padding_entries_are_as_if_removed(rng, kind):
    """NaN on them, and in lengths and weights, changes nothing: they are not sorted in either."""
    logprobs, lengths = draw(rng, 4, 6), rng.integers(1, 9, size=(2, 6))
    mask = np.array([True, False, True, True, False, True])
    weights = None if kind in BATCH_KINDS else np.float32(rng.random(6))
    expected = dpo(
        logprobs[:, mask],
        kind,
        lengths=tuple(lengths[:, mask]),
        weights=None if weights is None else weights[mask],
    )
    poisoned = np.where(mask, logprobs, np.nan)
    garbage = tuple(np.where(mask, lengths, np.nan).astype(np.float32))
    weights = None if weights is None else np.where(mask, weights, np.nan)
    output, gradient = jax.value_and_grad(dpo, has_aux=True)(
        poisoned, kind, lengths=garbage, weights=weights, mask=mask
    )
    chex.assert_trees_all_close(output, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert np.all(gradient[:, ~mask] == 0)
    assert np.any(gradient[:, mask] != 0)


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_parts_of_a_batch_add_up_but_for_kinds_that_sort(rng, kind):
    logprobs = draw(rng, 4, 6)
    complete, _ = dpo(logprobs, kind)
    parts = [dpo(logprobs[:, half::2], kind, denominator=6)[0] for half in (0, 1)]
    assert np.isclose(sum(parts), complete, rtol=1e-6) == (kind not in BATCH_KINDS)


def test_weights_multiply_each_pair_and_have_no_gradient(rng):
    logprobs, weights = draw(rng, 4, 6), np.float32(rng.random(6))
    each = [dpo(logprobs[:, i : i + 1], "sppo_hard")[0] for i in range(6)]

    def loss(weights):
        return dpo(logprobs, "sppo_hard", weights=weights)[0]

    value, gradient = jax.value_and_grad(loss)(weights)
    np.testing.assert_allclose(value, np.mean(weights * np.array(each)), rtol=1e-6)
    assert np.all(gradient == 0)


# --- Mixtures


def test_a_mixture_is_the_weighted_sum_with_metrics_of_sums(rng):
    logprobs, lengths = draw(rng, 4, 6), tuple(rng.integers(2, 9, size=(2, 6)))
    kinds, kind_weights = ("ipo", "sigmoid", "hinge", "sft", "aot"), (0.5, 2.0, 1.0, 0.25, 3.0)
    loss, metrics = functional.mixed_dpo_loss(
        *logprobs,
        kinds=kinds,
        kind_weights=kind_weights,
        lengths=lengths,
        label_smoothing=0.1,
        nll=1.5,
    )
    more = {"ipo": {"lengths": lengths}, "sft": {"nll": 1.5}}
    parts = [
        dpo(
            logprobs,
            kind,
            label_smoothing=0.1 if kind in SMOOTHED_KINDS else 0.0,
            **more.get(kind, {}),
        )
        for kind in kinds
    ]
    expected = sum(w * part for w, (part, _) in zip(kind_weights, parts, strict=True))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    chex.assert_trees_all_close(metrics, dpo(logprobs, "sigmoid")[1])
    assert abs(metrics["margin"] - parts[0][1]["margin"]) > 1e-3


def test_weights_of_pairs_leave_the_likelihood_of_a_mixture_alone(rng):
    logprobs, nothing = draw(rng, 4, 3), np.zeros(3, np.float32)
    loss, _ = functional.mixed_dpo_loss(*logprobs, kinds=("hinge", "sft"), nll=1.5, weights=nothing)
    assert loss == 1.5


# --- Messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "exo_pair", "label_smoothing": 0.0}, "label_smoothing must be above 0 and below"),
        ({"kind": "exo_pair", "label_smoothing": 1.0}, "label_smoothing must be above 0 and below"),
        ({"kind": "discopop", "label_smoothing": 0.1}, "label_smoothing must be 0 with kind 'disc"),
        ({"kind": "sft"}, "nll must be given with kind 'sft', .* nll is None"),
        ({"kind": "hinge", "nll": 1.0}, "nll must be given with kind 'sft', .* nll is given"),
        ({"kind": "aot", "weights": np.ones(2)}, "weights must be None with kind 'aot', which so"),
        (
            {"kind": "sft", "nll": 1.0, "weights": np.ones(2)},
            "weights must be None with kind 'sft'",
        ),
        ({"weights": np.ones(3)}, r"weights must be float\[B\] with B = 2, but is float64\[3\]"),
        ({"divergence": "kl"}, "divergence must be one of 'reverse_kl', 'forward_kl', "),
        ({"discopop_tau": np.ones(2)}, "discopop_tau must be a single number"),
        ({"kind": "aot_pair"}, "kind must be one of 'sigmoid', "),
    ],
)
def test_what_a_kind_does_not_support_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        functional.dpo_loss(*[np.zeros(2, np.float32)] * 4, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": "sigmoid"}, "kinds must be a tuple of kinds of dpo_loss, but is 'sigmoid'"),
        ({"kinds": ()}, r"kinds must be a tuple of kinds of dpo_loss, but is \(\)"),
        ({"kinds": ("hinge", "exo")}, r"kinds\[1\] must be one of 'sigmoid', .*, but is 'exo'"),
        ({"kinds": ("hinge", "exo_pair")}, "label_smoothing must be above 0 and below 1"),
        ({"kinds": ("hinge",), "label_smoothing": 0.1}, "label_smoothing must be 0 with kind 'hin"),
        ({"kinds": ("sft",)}, "nll must be given with kind 'sft'"),
        ({"nll": 1.0}, "nll must be None without the kind 'sft'"),
        ({"kind_weights": (1.0, 2.0)}, "kind_weights must be a tuple of 1 numbers, as many as kin"),
        ({"kind_weights": (np.ones(2),)}, r"kind_weights\[0\] must be a single number"),
        ({"kinds": ("aot",), "weights": np.ones(2)}, "weights must be None with kind 'aot'"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        functional.mixed_dpo_loss(*[np.zeros(2, np.float32)] * 4, **arguments)
