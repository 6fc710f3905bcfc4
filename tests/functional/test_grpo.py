"""The loss of GRPO, DAPO and Dr. GRPO against loops, and at extremes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rlhf

REDUCTIONS = ["sequence", "token", "constant"]


METRICS = ("clipfrac", "clipfrac_low", "clipfrac_high", "approxkl", "ratio", "kl", "entropy")


def grpo_by_loop(logprobs, old, ref, advantages, mask, kl_coef, low, high, reduction):
    """(loss, {metric: mean}), in which an example is a list of (loss, *metrics)."""
    examples = []
    for b, real in enumerate(mask):
        example = []
        for t in np.nonzero(real)[0]:
            log_ratio = float(logprobs[b, t]) - float(old[b, t])
            ratio, advantage = np.exp(log_ratio), float(advantages[b])
            bounded = min(max(ratio, 1 - low), 1 + high)
            d = 0.0 if ref is None else float(logprobs[b, t]) - float(ref[b, t])
            kl = np.exp(-d) - 1 + d
            loss = -min(advantage * ratio, advantage * bounded) + kl_coef * kl
            clipped = advantage * bounded < advantage * ratio
            sides = (clipped and advantage < 0, clipped and advantage > 0)
            example.append((loss, clipped, *sides, log_ratio**2 / 2, ratio, kl, 0.0))
        examples.append(example)
    means = [np.mean(example, axis=0) for example in examples if example]
    tokens = [token for example in examples for token in example]
    by_reduction = {
        "sequence": (np.mean(means, axis=0)[0], np.mean(means, axis=0)),
        "token": (np.mean(tokens, axis=0)[0], np.mean(tokens, axis=0)),
        "constant": (np.sum(tokens, axis=0)[0] / mask.size, np.sum(means, axis=0) / len(mask)),
    }
    loss, metrics = by_reduction[reduction]
    return loss, dict(zip(METRICS, metrics[1:], strict=True))


@pytest.fixture
def batch(rng, ragged_mask):
    old, ref, new = rng.normal(size=(3, *ragged_mask.shape)).astype(np.float32)
    logprobs = (0.7 * old + 0.3 * new).astype(np.float32)
    return logprobs, old, ref, rng.normal(size=len(old)).astype(np.float32), ragged_mask


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("low", "high", "kl_coef"), [(None, None, 0.0), (0.05, None, 0.3), (0.1, 0.4, 0.3)]
)
def test_grpo_loss_matches_a_loop(batch, reduction, low, high, kl_coef):
    logprobs, old, ref, advantages, mask = batch
    options = {} if low is None else {"clip_range": low, "clip_range_high": high}
    loss, metrics = rlhf.grpo_loss(
        logprobs, old, advantages, mask,
        ref_logprobs=ref, kl_coef=kl_coef, reduction=reduction, **options,
    )  # fmt: skip
    low = low or 0.2
    expected = grpo_by_loop(
        logprobs, old, ref, advantages, mask, kl_coef, low, high or low, reduction
    )
    assert 0 < expected[1]["clipfrac"] < 1
    chex.assert_trees_all_close((loss, metrics), expected, rtol=1e-5)


def test_sequence_is_the_default_and_without_a_reference_the_kl_is_zero(batch):
    logprobs, old, _, advantages, mask = batch
    output = rlhf.grpo_loss(logprobs, old, advantages, mask)
    expected = grpo_by_loop(logprobs, old, None, advantages, mask, 0.0, 0.2, 0.2, "sequence")
    assert expected[1]["kl"] == 0
    chex.assert_trees_all_close(output, expected, rtol=1e-5)


def test_the_upper_range_bounds_only_ratios_above_one():
    logprobs, old = np.log(np.float32([[1.35, 0.75]])), np.zeros((1, 2), np.float32)
    mask = np.ones((1, 2), bool)

    def slopes(advantage, **options):
        loss = lambda x: rlhf.grpo_loss(x, old, np.float32([advantage]), mask, **options)[0]  # noqa: E731
        return np.asarray(jax.grad(loss)(logprobs)[0] != 0).tolist()

    assert slopes(1.0, clip_range=0.2) == [False, True]
    assert slopes(1.0, clip_range=0.2, clip_range_high=0.4) == [True, True]
    assert slopes(-1.0, clip_range=0.2) == [True, False]
    assert slopes(-1.0, clip_range=0.3, clip_range_high=0.2) == [True, True]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_at_equal_policies_the_mean_ratio_is_one_whatever_the_padding(rng, reduction):
    logprobs = rng.normal(size=(3, 6)).astype(np.float32)
    mask = np.arange(6) < np.array([6, 2, 3])[:, None]
    _, metrics = rlhf.grpo_loss(logprobs, logprobs, logprobs[:, 0], mask, reduction=reduction)
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=1e-6)


def test_empty_responses_count_only_in_the_constant(batch):
    logprobs, old, _, advantages, mask = batch
    real = mask.any(axis=1)
    assert not real.all()
    for reduction in REDUCTIONS:
        full = rlhf.grpo_loss(logprobs, old, advantages, mask, reduction=reduction)
        kept = (x[real] for x in (logprobs, old, advantages, mask))
        without = rlhf.grpo_loss(*kept, reduction=reduction)
        share = real.mean() if reduction == "constant" else 1.0
        expected = jax.tree.map(lambda x, share=share: x * share, without)
        chex.assert_trees_all_close(full, expected, rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("log_ratio", [-1e4, -89.0, 89.0, 1e4])
@pytest.mark.parametrize("advantage", [-10.0, 0.0, 10.0])
def test_extreme_ratios_have_finite_losses_and_gradients(log_ratio, advantage, reduction):
    old, ref = np.zeros((2, 2), np.float32), np.float32([[0.0, 0.0], [-log_ratio, 0.0]])
    logprobs, mask = (
        np.float32([[log_ratio, 0.0], [0.0, 0.0]]),
        np.array([[True, True], [True, False]]),
    )

    def loss(logprobs, old, ref, advantages):
        return rlhf.grpo_loss(
            logprobs, old, advantages, mask, ref_logprobs=ref, kl_coef=0.1, reduction=reduction
        )

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(
        logprobs, old, ref, np.float32([advantage, 1.0])
    )
    assert np.isfinite([value, *metrics.values()]).all()
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({}, "ref to policy"),  # k3 is the default
        ({"kl_kind": "k2"}, "policy to ref"),
        ({"kl_kind": "k1"}, "none"),
        ({"kl_kind": "k1", "kl_bias_correction": True}, "policy to ref"),
        ({"kl_kind": "k3", "kl_bias_correction": True}, "policy to ref"),
    ],
)
@pytest.mark.parametrize("is_on_policy", [True, False])
def test_the_expected_gradient_of_the_penalty_by_enumeration(rng, options, target, is_on_policy):
    """The expectation over all tokens of the gradient of each, against those of both divergences.

    Off-policy, sampled by a third distribution, only a corrected penalty keeps its gradient.
    """
    logits, ref, old = rng.normal(size=(3, 7)).astype(np.float32)
    ref, sampled = jax.nn.log_softmax(ref), jax.nn.log_softmax(logits if is_on_policy else old)
    zero, mask = np.zeros(1, np.float32), np.ones((1, 1), bool)

    def expected_penalty(logits):
        def penalty(logprob, old, ref):
            columns = (x[None, None] for x in (logprob, old))
            return rlhf.grpo_loss(
                *columns, zero, mask, ref_logprobs=ref[None, None], kl_coef=1.0, **options
            )[0]

        losses = jax.vmap(penalty)(jax.nn.log_softmax(logits), sampled, ref)
        return np.exp(sampled) @ losses

    def divergence(p, q):
        return jnp.exp(p) @ (p - q)

    gradient = jax.grad(expected_penalty)(logits)
    divergences = {
        "policy to ref": lambda x: divergence(jax.nn.log_softmax(x), ref),
        "ref to policy": lambda x: divergence(ref, jax.nn.log_softmax(x)),
        "none": lambda x: jnp.zeros(()),
    }
    has_target = is_on_policy or "kl_bias_correction" in options
    for name, each in divergences.items():
        distance = np.abs(jax.grad(each)(logits) - gradient).max()
        assert (distance < 2e-6) == (name == target and has_target), (name, distance)


@pytest.mark.parametrize("kl_coef", [0.1, -1, np.float32(0.5), np.float64(0.5)])
def test_a_penalty_without_a_reference_is_named(batch, kl_coef):
    logprobs, old, _, advantages, mask = batch
    with pytest.raises(ValueError, match="^ref_logprobs must be given if kl_coef is not 0"):
        rlhf.functional.grpo_loss(logprobs, old, advantages, mask, kl_coef=kl_coef)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kl_kind", "k4", "kl_kind must be one of 'k1', 'k2', 'k3', but is 'k4'"),
        ("reduction", "mean", "reduction must be one of 'sequence', 'token', 'constant'"),
        ("ref_logprobs", np.zeros((5, 6), np.float32), r"ref_logprobs must be float\[B, T\] with"),
        ("ref_logprobs", np.zeros((5, 7), int), r"ref_logprobs must be float\[B, T\] with"),
    ],
)
def test_wrong_keywords_are_named(batch, name, value, message):
    logprobs, old, _, advantages, mask = batch
    with pytest.raises(ValueError, match=f"^{message}"):
        rlhf.grpo_loss(logprobs, old, advantages, mask, **{name: value})


def test_advantages_are_one_per_response_or_per_token(batch):
    logprobs, old, _, advantages, mask = batch
    by_token = np.broadcast_to(advantages[:, None], mask.shape)
    one, other = (rlhf.grpo_loss(logprobs, old, each, mask) for each in (advantages, by_token))
    chex.assert_trees_all_equal(one, other)
    with pytest.raises(ValueError, match=r"^advantages must be float\[B\] with B = 5, but is "):
        rlhf.grpo_loss(logprobs, old, advantages[1:], mask)


def test_a_traced_penalty_without_a_reference_is_not_silent(batch):
    logprobs, old, _, advantages, mask = batch
    for kl_coef, is_silent in ((0.0, True), (0.1, False)):
        loss, gradient = jax.value_and_grad(
            lambda x, coef: rlhf.grpo_loss(x, old, advantages, mask, kl_coef=coef)[0]
        )(logprobs, kl_coef)
        assert np.isfinite(loss) == is_silent
        assert np.isfinite(gradient[mask]).all() == is_silent


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_the_advantage_of_an_empty_response_has_no_effect(batch, reduction):
    logprobs, old, _, advantages, mask = batch
    empty = ~mask.any(axis=1)
    assert empty.any()
    poisoned = np.where(empty, np.nan, advantages).astype(np.float32)
    losses = [
        jax.grad(lambda x, a: rlhf.grpo_loss(x, old, a, mask, reduction=reduction)[0])(logprobs, a)
        for a in (advantages, poisoned)
    ]
    np.testing.assert_array_equal(*losses)


def variant_by_loop(arrays, kind, level, reduction, weights, length):
    """(loss, clipfrac) of the variants: coefficients are those of the test below.

    The KL is weighted by the ratio of the level.
    """
    logprobs, old, ref, entropy, advantages, mask = arrays
    losses, clipped = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, row in enumerate(mask):
        tokens = np.nonzero(row)[0]
        differences = [float(logprobs[b, t]) - float(old[b, t]) for t in tokens]
        for t, difference in zip(tokens, differences, strict=True):
            ratio = np.exp(difference if level == "token" else np.mean(differences))
            advantage, logprob = float(advantages[b]), float(logprobs[b, t])
            if kind == "clip":
                bounded = min(max(ratio, 0.8), 1.3)
                loss = -min(advantage * ratio, advantage * bounded)
                clipped[b, t] = advantage * bounded < advantage * ratio
            elif kind == "cispo":
                loss, clipped[b, t] = -min(ratio, 1.3) * advantage * logprob, ratio > 1.3
            else:
                tau = 0.5 if advantage > 0 else 2.0
                loss = -advantage * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))
            d = logprob - float(ref[b, t])
            kl = ratio * (np.exp(-d) - 1 + d)
            losses[b, t] = weights[b, t] * loss + 0.3 * kl - 0.2 * entropy[b, t]
    counts = mask.sum(axis=1)
    if reduction == "token":
        return losses.sum() / counts.sum(), clipped.sum() / counts.sum()
    by_response = [x.sum(axis=1)[counts > 0] / counts[counts > 0] for x in (losses, clipped)]
    if reduction == "sequence":
        return by_response[0].mean(), by_response[1].mean()
    return losses.sum() / (len(mask) * length), by_response[1].sum() / len(mask)


@pytest.mark.parametrize(
    ("kind", "level", "reduction"),
    [
        ("clip", "sequence", "sequence"),
        ("clip", "sequence_token", "token"),
        ("cispo", "token", "token"),
        ("sapo", "token", "constant"),
    ],
)
def test_variants_match_a_loop(rng, batch, kind, level, reduction):
    logprobs, old, ref, advantages, mask = batch
    entropy, weights = np.exp(rng.normal(size=(2, *mask.shape))).astype(np.float32)
    options = {"kind": kind, "level": level, "reduction": reduction, "max_length": 9}
    options["kl_bias_correction"] = True
    coefficients = {"clip_range_high": 0.3, "kl_coef": 0.3, "entropy_coef": 0.2}
    gates = {"temperature_pos": 0.5, "temperature_neg": 2.0}
    loss, metrics = rlhf.grpo_loss(
        logprobs, old, advantages, mask,
        weights=weights, ref_logprobs=ref, entropy=entropy, **options, **coefficients, **gates,
    )  # fmt: skip
    arrays = (logprobs, old, ref, entropy, advantages, mask)
    expected = variant_by_loop(arrays, kind, level, reduction, weights, 9)
    np.testing.assert_allclose([loss, metrics["clipfrac"]], expected, rtol=2e-5)


def test_gradients_of_sequence_ratios(batch):
    """The ratio of a response has the same gradient in all of its tokens; that of its tokens has
    the weight of each token alone: with one advantage for the response both are the same.
    """
    logprobs, old, _, advantages, mask = batch
    by_token = (advantages[:, None] * np.linspace(0.5, 2.0, mask.shape[1])).astype(np.float32)

    def gradient(level, advantages):
        def loss(x):
            return rlhf.functional.grpo_loss(
                x, old, advantages, mask, level=level, clip_range=100.0
            )[0]

        return jax.grad(loss)(logprobs)

    sequence, token = (gradient(level, advantages) for level in ("sequence", "sequence_token"))
    np.testing.assert_allclose(sequence, token, rtol=1e-5, atol=1e-8)
    sequence, token = (gradient(level, by_token) for level in ("sequence", "sequence_token"))
    np.testing.assert_allclose(sequence[0], np.full(7, sequence[0, 0]), rtol=1e-5)
    ratio = token[0] / by_token[0]
    np.testing.assert_allclose(ratio, np.full(7, ratio[0]), rtol=1e-5)


def test_what_is_missing_or_without_sense_is_named(batch):
    logprobs, old, _, advantages, mask = batch
    for options, message in (
        ({"entropy_coef": 0.1}, "entropy must be given if entropy_coef is not 0, but"),
        ({"temperature_neg": 0.0}, "temperature_neg must be above 0, but is 0.0"),
        ({"max_length": 0}, "max_length must be above 0, but is 0"),
        ({"kind": "ppo"}, "kind must be one of 'clip', 'cispo', 'sapo', but is 'ppo'"),
        ({"level": "row"}, "level must be one of 'token', 'sequence', 'sequence_token', but"),
        ({"weights": mask}, r"weights must be float\[B, T\] with B = 5, T = 7, but is bool"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            rlhf.functional.grpo_loss(logprobs, old, advantages, mask, **options)
