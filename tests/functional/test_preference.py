"""Losses on preferences: loops, TRL's numbers, properties, extremes, messages."""

import chex
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import rlhf_jax as rlhf
from rlhf_jax import functional

KINDS = ["sigmoid", "hinge", "ipo", "robust"]
PAIR_METRICS = ["accuracy", "margin", "chosen_reward", "rejected_reward"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pair_loss(kind, h, beta, s):
    """One pair's loss by the formula as it is written, in float64."""
    if kind == "sigmoid":
        return -(1 - s) * np.log(sigmoid(beta * h)) - s * np.log(sigmoid(-beta * h))
    if kind == "hinge":
        return max(0.0, 1 - beta * h)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    flipped = -np.log(sigmoid(-beta * h))
    return (-(1 - s) * np.log(sigmoid(beta * h)) - s * flipped) / (1 - 2 * s)


def dpo_by_loop(logprobs, beta, kind, s, lengths):
    losses, wins, chosen_rewards, rejected_rewards = [], [], [], []
    for b in range(len(logprobs[0])):
        policy_c, policy_r, ref_c, ref_r = (float(x[b]) for x in logprobs)
        chosen, rejected = policy_c - ref_c, policy_r - ref_r
        if lengths is not None:
            chosen, rejected = chosen / lengths[0][b], rejected / lengths[1][b]
        losses.append(pair_loss(kind, chosen - rejected, beta, s))
        wins.append(chosen > rejected)
        chosen_rewards.append(beta * chosen)
        rejected_rewards.append(beta * rejected)
    margin = np.mean(chosen_rewards) - np.mean(rejected_rewards)
    return (
        np.mean(losses),
        np.mean(wins),
        margin,
        np.mean(chosen_rewards),
        np.mean(rejected_rewards),
    )


def draw(rng, *shape, scale=3.0):
    return (-scale * np.exp(0.5 * rng.normal(size=shape))).astype(np.float32)


def assert_loss_and_metrics(output, expected, rtol=1e-5):
    loss, metrics = output
    assert sorted(metrics) == sorted(PAIR_METRICS)
    actual = [loss, *(metrics[name] for name in PAIR_METRICS)]
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-6)


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


def kto_by_loop(chosen, rejected, z, beta, weights):
    """Of the log-ratios of both sorts."""
    losses = [weights[0] * (1 - sigmoid(beta * (float(x) - z))) for x in chosen]
    losses += [weights[1] * (1 - sigmoid(beta * (z - float(x)))) for x in rejected]
    right = [float(x) > z for x in chosen] + [float(x) < z for x in rejected]
    rewards = [beta * np.mean(np.float64(x)) if len(x) else 0.0 for x in (chosen, rejected)]
    return np.mean(losses), np.mean(right), rewards[0] - rewards[1], *rewards


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


# --- TRL's numbers


def hyperparameters(case, index):
    names = [name.removeprefix("hp/") for name in case if name.startswith("hp/")]
    values = {name: case[f"hp/{name}"][index] for name in names}
    return {name: str(x) if name == "kind" else float(x) for name, x in values.items()}


def assert_trls(case, index, output, gradients, names=("accuracy", *PAIR_METRICS[1:])):
    loss, metrics = output
    actual = {"loss": loss, "grad_chosen": gradients[0], "grad_rejected": gradients[1]}
    actual |= {name: metrics[name] for name in names}
    for name, x in actual.items():
        expected = case[f"out/{name}"][index]
        np.testing.assert_allclose(x, expected, rtol=5e-6, atol=1e-6, err_msg=name)


def value_and_gradients(loss, chosen, rejected):
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(chosen, rejected)


@pytest.mark.parametrize("index", range(9))
def test_dpo_loss_is_trls(golden, index):
    """But for two things.

    TRL divides log-ratios by lengths for "ipo", and then logs rewards of sums: ours are those of
    the loss, so its metrics are compared without lengths. And its "sigmoid" ignores
    label_smoothing (the second case has 0.3): line 28 of docs/facts.md.
    """
    case = golden("trl")["dpo"]
    settings = hyperparameters(case, index)
    ref = case["ref_chosen"], case["ref_rejected"]
    if settings["kind"] != "robust":
        del settings["label_smoothing"]
    lengths = (case["chosen_lengths"], case["rejected_lengths"])

    def loss(chosen, rejected, lengths=lengths if settings["kind"] == "ipo" else None):
        return rlhf.dpo_loss(chosen, rejected, *ref, lengths=lengths, **settings)

    policy = case["policy_chosen"], case["policy_rejected"]
    (value, _), gradients = value_and_gradients(loss, *policy)
    assert_trls(case, index, (value, loss(*policy, None)[1]), gradients)


def test_28_ipo_on_sums_and_on_means_are_different_losses(golden):
    """Line 28 of docs/facts.md: on one batch 23.72 of sums and 24.78 of means. Here TRL's batch.

    The paper and OpenRLHF take sums, our default; TRL takes means: `lengths`.
    """
    case = golden("trl")["dpo"]
    index = list(case["hp/kind"]).index("ipo")
    logprobs = [
        case[name] for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    ]
    settings = {"kind": "ipo", "beta": float(case["hp/beta"][index])}
    lengths = case["chosen_lengths"], case["rejected_lengths"]
    sums, _ = rlhf.dpo_loss(*logprobs, **settings)
    means, _ = rlhf.dpo_loss(*logprobs, lengths=lengths, **settings)
    np.testing.assert_allclose(means, case["out/loss"][index], rtol=5e-6)
    np.testing.assert_allclose(sums, dpo_by_loop(logprobs, 0.1, "ipo", 0.0, None)[0], rtol=5e-6)
    assert abs(sums - means) > 0.5


def test_28_label_smoothing_does_nothing_in_trls_sigmoid_and_does_in_ours(golden):
    """Line 28 of docs/facts.md. What it should give TRL's CPO does give: tested below."""
    case = golden("trl")["dpo"]
    settings = hyperparameters(case, 1)
    assert settings["kind"] == "sigmoid"
    assert settings["label_smoothing"] == 0.3
    logprobs = [
        case[name] for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    ]
    plain, _ = rlhf.dpo_loss(*logprobs, beta=settings["beta"])
    smoothed, _ = rlhf.dpo_loss(*logprobs, **settings)
    np.testing.assert_allclose(plain, case["out/loss"][1], rtol=5e-6)
    assert abs(smoothed - plain) > 0.05


@pytest.mark.parametrize("index", range(4))
def test_without_a_reference_dpo_loss_is_trls_cpo(golden, index):
    """Contrastive preference optimization without its likelihood term; conservative in case 0."""
    case = golden("trl")["cpo"]
    settings = hyperparameters(case, index)
    nothing = np.zeros_like(case["policy_chosen"])

    def loss(chosen, rejected):
        return functional.dpo_loss(chosen, rejected, nothing, nothing, **settings)

    policy = case["policy_chosen"], case["policy_rejected"]
    assert_trls(case, index, *value_and_gradients(loss, *policy))


@pytest.mark.parametrize("index", range(3))
def test_simpo_loss_is_trls(golden, index):
    """TRL's default adds the likelihood loss (`cpo_alpha`), which is not SimPO's: off there."""
    case = golden("trl")["simpo"]
    settings = hyperparameters(case, index)
    assert settings.pop("kind") == "simpo"

    def loss(chosen, rejected):
        return rlhf.simpo_loss(chosen, rejected, **settings)

    policy = case["policy_chosen"], case["policy_rejected"]
    assert_trls(case, index, *value_and_gradients(loss, *policy))


@pytest.mark.parametrize("index", range(2))
def test_orpo_loss_is_trls(golden, index):
    case = golden("trl")["orpo"]
    settings = hyperparameters(case, index)

    def loss(chosen, rejected):
        return rlhf.orpo_loss(chosen, rejected, case["nll"], **settings)

    policy = case["policy_chosen"], case["policy_rejected"]
    assert_trls(case, index, *value_and_gradients(loss, *policy))


@pytest.mark.parametrize("index", range(4))
def test_kto_loss_is_trls(golden, index):
    """TRL logs no accuracy for KTO. In the last case kl is negative, and clamped by both."""
    case = golden("trl")["kto"]
    settings, kl = hyperparameters(case, index), case["kl"][index]
    assert (kl < 0) == (case["out/kl_clamped"][index] == 0) == (index == 3)

    def loss(chosen, rejected):
        return rlhf.kto_loss(
            chosen, rejected, case["ref_chosen"], case["ref_rejected"], kl, **settings
        )

    policy = case["policy_chosen"], case["policy_rejected"]
    output, gradients = value_and_gradients(loss, *policy)
    assert_trls(case, index, output, gradients, ("chosen_reward", "rejected_reward"))


# --- Properties

logprob = st.floats(-50.0, 0.0, width=32)
pairs_of_logprobs = st.lists(st.tuples(logprob, logprob, logprob, logprob), min_size=3, max_size=3)
betas = st.floats(0.03125, 2.0, width=32)


def columns(examples):
    return np.float32(examples).T


@hypothesis.given(pairs_of_logprobs, betas)
def test_the_gradient_of_dpo_is_the_published_one(examples, beta):
    """-beta * sigmoid(-z) * (grad log pi(chosen) - grad log pi(rejected)), z the reward margin.

    The policy is a softmax over four responses, of which the first two are a pair, and the gradient
    is the one by its logits.
    """
    logits = np.float32(examples)
    ref = logits[:, 2:]

    def logprobs(logits):
        logp = jax.nn.log_softmax(logits)
        return logp[:, 0], logp[:, 1]

    def loss(logits):
        return functional.dpo_loss(*logprobs(logits), *ref.T, beta=beta)[0]

    chosen, rejected = logprobs(logits)
    z = np.float64(beta) * ((np.float64(chosen) - ref[:, 0]) - (np.float64(rejected) - ref[:, 1]))
    of_chosen, of_rejected = (
        jax.grad(lambda logits, i=i: logprobs(logits)[i].sum())(logits) for i in (0, 1)
    )
    direction = np.float64(of_chosen) - np.float64(of_rejected)
    published = -beta * sigmoid(-z)[:, None] * direction / len(examples)
    np.testing.assert_allclose(jax.grad(loss)(logits), published, rtol=1e-4, atol=1e-6)


@hypothesis.given(pairs_of_logprobs, betas, st.sampled_from(KINDS), st.integers(-64, 64))
def test_one_constant_on_policy_and_reference_changes_nothing(examples, beta, kind, constant):
    """Nor does the same constant on both responses of a pair: both cancel in h.

    Log-probabilities are rounded to quarters, so that float32 adds the constant exactly.
    """
    policy_c, policy_r, ref_c, ref_r = np.round(4 * columns(examples)) / 4

    def loss(*arrays):
        return functional.dpo_loss(*(np.float32(x) for x in arrays), beta=beta, kind=kind)

    expected = loss(policy_c, policy_r, ref_c, ref_r)
    shifted = loss(policy_c + constant, policy_r, ref_c + constant, ref_r)
    chex.assert_trees_all_close(shifted[0], expected[0], rtol=1e-6)
    chex.assert_trees_all_close(shifted[1], expected[1], rtol=1e-6)
    both = loss(policy_c + constant, policy_r + constant, ref_c, ref_r)
    np.testing.assert_allclose(both[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(both[1]["margin"], expected[1]["margin"], rtol=1e-6)


@hypothesis.given(pairs_of_logprobs, betas, st.floats(0.0, 1.0))
def test_conservative_dpo_of_swapped_pairs_has_the_other_smoothing(examples, beta, smoothing):
    policy_c, policy_r, ref_c, ref_r = columns(examples)
    one, _ = functional.dpo_loss(
        policy_c, policy_r, ref_c, ref_r, beta=beta, label_smoothing=smoothing
    )
    other, _ = functional.dpo_loss(
        policy_r, policy_c, ref_r, ref_c, beta=beta, label_smoothing=1 - smoothing
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@hypothesis.given(pairs_of_logprobs, betas, st.floats(0.0, 0.45))
def test_over_swaps_of_labels_robust_dpo_is_in_expectation_dpo(examples, beta, smoothing):
    policy_c, policy_r, ref_c, ref_r = columns(examples)
    robust = {"beta": beta, "kind": "robust", "label_smoothing": smoothing}
    kept, _ = functional.dpo_loss(policy_c, policy_r, ref_c, ref_r, **robust)
    swapped, _ = functional.dpo_loss(policy_r, policy_c, ref_r, ref_c, **robust)
    expected, _ = functional.dpo_loss(policy_c, policy_r, ref_c, ref_r, beta=beta)
    mean = (1 - smoothing) * np.float64(kept) + smoothing * np.float64(swapped)
    # The two cancel, the more the nearer the smoothing is to 1/2.
    size = 1 + np.abs(columns(examples)).max() / (1 - 2 * smoothing)
    np.testing.assert_allclose(mean, expected, atol=1e-5 * size)


@hypothesis.given(pairs_of_logprobs, betas)
def test_without_smoothing_sigmoid_conservative_and_robust_are_one(examples, beta):
    arrays = columns(examples)
    plain = rlhf.dpo_loss(*arrays, beta=beta)
    conservative = rlhf.dpo_loss(*arrays, beta=beta, label_smoothing=0.0)
    robust = rlhf.dpo_loss(*arrays, beta=beta, kind="robust", label_smoothing=0.0)
    chex.assert_trees_all_close(conservative, plain, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_close(robust, plain, rtol=1e-6, atol=1e-7)


@hypothesis.given(pairs_of_logprobs, betas)
def test_simpo_without_a_target_margin_is_dpo_without_a_reference(examples, beta):
    chosen, rejected = columns(examples)[:2]
    nothing = np.zeros_like(chosen)
    chex.assert_trees_all_close(
        functional.simpo_loss(chosen, rejected, beta=beta, gamma=0.0),
        functional.dpo_loss(chosen, rejected, nothing, nothing, beta=beta),
        rtol=1e-6,
        atol=1e-7,
    )


def test_lengths_of_one_are_no_lengths_and_may_be_floats(rng):
    logprobs = draw(rng, 4, 5)
    expected = rlhf.dpo_loss(*logprobs, kind="ipo")
    for dtype in (np.int32, np.float32):
        ones = (np.ones(5, dtype),) * 2
        chex.assert_trees_all_equal(rlhf.dpo_loss(*logprobs, kind="ipo", lengths=ones), expected)


def test_lengths_may_be_mapped_over(rng):
    logprobs = draw(rng, 4, 3, 5)
    lengths = tuple(rng.integers(0, 9, size=(2, 3, 5)))

    def loss(logprobs, lengths):
        return rlhf.dpo_loss(*logprobs, kind="ipo", lengths=lengths)

    mapped = jax.vmap(loss, (1, 0))(logprobs, lengths)
    looped = [loss(logprobs[:, i], (lengths[0][i], lengths[1][i])) for i in range(3)]
    chex.assert_trees_all_close(mapped, jax.tree.map(lambda *x: np.stack(x), *looped), rtol=1e-6)


def test_an_empty_response_has_no_length_to_divide_by(rng):
    logprobs = np.zeros((4, 2), np.float32)
    loss, _ = rlhf.dpo_loss(*logprobs, kind="ipo", beta=0.5, lengths=(np.zeros(2, int),) * 2)
    assert loss == 1.0


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


# --- Extremes


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
