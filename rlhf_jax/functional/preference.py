"""Losses of a policy on preferences, without a reward model.

Their arguments are log-probabilities of full responses, one number each.
"""

import numbers

import jax
import jax.numpy as jnp

from rlhf_jax.functional.expect import expect, expect_one_of, expect_scalars
from rlhf_jax.functional.masking import batch_mean, count_or_one, zero_off_mask

DPO_KINDS = ("sigmoid", "hinge", "ipo", "robust")

# float32's epsilon: a probability with a logarithm closer to 0 rounds to 1.
MIN_DISTANCE = 2.0**-23


def dpo_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    *,
    beta=0.1,
    kind="sigmoid",
    label_smoothing=0.0,
    lengths=None,
    mask=None,
    denominator=None,
):
    """Direct preference optimization and its variants, a mean over pairs.

        h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
        s = label_smoothing

        sigmoid    -(1 - s) * log sigmoid(beta * h) - s * log sigmoid(-beta * h)
        hinge      max(0, 1 - beta * h)
        ipo        (h - 1 / (2 * beta))^2
        robust     (-(1 - s) * log sigmoid(beta * h) + s * log sigmoid(-beta * h)) / (1 - 2 * s)

    s is the assumed share of pairs with swapped labels. "sigmoid" with s > 0 is conservative DPO,
    with a target probability of 1 - s; the expectation of "robust" over swaps is the loss of the
    true labels.

    Args:
      policy_chosen: float[B], log-probabilities of the preferred responses under the policy in
        training, in nats: sums over their tokens.
      policy_rejected: float[B], the same for the other responses.
      ref_chosen: float[B], log-probabilities of the preferred ones under the reference.
      ref_rejected: float[B], the same for the others.
      beta: strength of the KL constraint to the reference (the paper's tau for "ipo").
      kind: "sigmoid", "hinge", "ipo" or "robust".
      label_smoothing: s. "hinge" and "ipo" do not support it: a traced value other than 0 makes
        their loss NaN. "robust" needs a value below 0.5.
      lengths: (int[B], int[B]), tokens of the chosen and of the rejected responses, or floats: each
        log-ratio, policy - ref, is divided by its length, or by 1 for an empty response. TRL does
        this for "ipo", as advised by its authors; their paper, and OpenRLHF, do not. None: sums.
      mask: bool[B], False on padding entries of the batch; None: all are real.
      denominator: divisor of the sums, instead of the number of real pairs.

    Returns:
      (loss, metrics), f32[] each. A reward is beta * (policy - ref), per token with lengths;
      metrics `accuracy`, the share of pairs in which the chosen one has the higher reward (ties
      count as wrong), `margin`, the mean difference of rewards, `chosen_reward` and
      `rejected_reward`, their means. All are 0 if no pair is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, an unknown kind, or a
        label_smoothing that the kind does not support, if it is not traced.

    Rafailov et al., Direct Preference Optimization, eq. 7 (arXiv:2305.18290); conservative:
    Mitchell, A note on DPO with noisy preferences (ericmitchell.ai/cdpo.pdf); hinge: the loss of
    Zhao et al., SLiC-HF, section 2 (arXiv:2305.10425) on log-ratios, as in Liu et al., Statistical
    Rejection Sampling (arXiv:2309.06657); ipo: Gheshlaghi Azar et al., eq. 17 (arXiv:2310.12036);
    robust: Ray Chowdhury et al., Provably Robust DPO, section 3.1 (arXiv:2403.00409).

    >>> loss, metrics = dpo_loss(
    ...     jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([-2.0]), jnp.array([-2.0]), beta=0.5)
    >>> print(f"{loss:.4f}", metrics["margin"], metrics["chosen_reward"])
    0.3133 1.0 0.5
    """
    expect_one_of(kind=(kind, DPO_KINDS))
    expect_scalars(beta=beta, label_smoothing=label_smoothing)
    _expect_label_smoothing(kind, label_smoothing)
    mask, policy_chosen, policy_rejected, ref_chosen, ref_rejected = _masked(
        mask,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    if lengths is not None:
        _expect_lengths(policy_chosen, lengths)
        chosen_lengths, rejected_lengths = zero_off_mask(mask, *lengths)
        chosen = chosen / jnp.maximum(chosen_lengths, 1.0)
        rejected = rejected / jnp.maximum(rejected_lengths, 1.0)
    losses = _dpo_losses(chosen - rejected, beta, kind, label_smoothing)
    metrics = _pair_metrics(chosen, rejected, beta, mask, denominator)
    return batch_mean(losses, mask, denominator), metrics


def simpo_loss(policy_chosen, policy_rejected, *, beta=2.0, gamma=1.0, mask=None, denominator=None):
    """Simple preference optimization: no reference, means per token; a mean over pairs.

        -log sigmoid(beta * (policy_chosen - policy_rejected) - gamma)

    Args:
      policy_chosen: float[B], log-probabilities of the preferred responses under the policy in
        training, in nats per token: means over their tokens.
      policy_rejected: float[B], the same for the other responses.
      beta: scale of the rewards.
      gamma: target margin of the rewards. Some implementations have gamma / beta instead.
      mask: bool[B], False on padding entries of the batch; None: all are real.
      denominator: divisor of the sums, instead of the number of real pairs.

    Returns:
      (loss, metrics), f32[] each, with the metrics of `dpo_loss`, for rewards of beta times a
      log-probability; gamma is not included. All are 0 if no pair is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Meng et al., SimPO, eq. 6 (arXiv:2405.14734).

    >>> loss, metrics = simpo_loss(jnp.array([-1.0]), jnp.array([-2.0]))
    >>> print(f"{loss:.4f}", metrics["margin"])
    0.3133 2.0
    """
    mask, chosen, rejected = _masked(
        mask, policy_chosen=policy_chosen, policy_rejected=policy_rejected
    )
    expect_scalars(beta=beta, gamma=gamma)
    losses = -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)
    metrics = _pair_metrics(chosen, rejected, beta, mask, denominator)
    return batch_mean(losses, mask, denominator), metrics


def orpo_loss(policy_chosen, policy_rejected, nll, *, beta=0.1, mask=None, denominator=None):
    """Odds ratio preference optimization: the likelihood loss plus a mean over pairs.

        log_odds(x) = log(e^x / (1 - e^x)) = x - log(1 - e^x)
        nll - beta * mean(log sigmoid(log_odds(policy_chosen) - log_odds(policy_rejected)))

    The odds of a response with probability 1 are infinite: log-probabilities above -2^-23, whose
    probability rounds to 1 in float32, are set to -2^-23, log-odds of 15.9, and have gradient 0.

    Args:
      policy_chosen: float[B], log-probabilities of the preferred responses under the policy in
        training, in nats per token: means over their tokens.
      policy_rejected: float[B], the same for the other responses.
      nll: float[], the supervised loss on the preferred responses. It is added unchanged: for
        micro-batches it has to be divided by the count of the large batch, as by
        `cross_entropy_loss` with a denominator.
      beta: weight of the second term (the paper's lambda).
      mask: bool[B], False on padding entries of the batch; None: all are real.
      denominator: divisor of the sums over pairs, instead of the number of real pairs.

    Returns:
      (loss, metrics), f32[] each, with the metrics of `dpo_loss`, for rewards of beta times a
      log-probability, as in TRL. If no pair is real the loss is nll and the metrics are 0.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Hong et al., ORPO, eq. 6 and 7, odds: eq. 4 (arXiv:2403.07691).

    >>> loss, _ = orpo_loss(jnp.log(jnp.array([0.8])), jnp.log(jnp.array([0.5])), 1.0, beta=1.0)
    >>> print(f"{loss:.4f}")
    1.2231
    """
    expect_scalars(nll=nll, beta=beta)
    mask, chosen, rejected = _masked(
        mask, policy_chosen=policy_chosen, policy_rejected=policy_rejected
    )
    losses = -jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))
    metrics = _pair_metrics(chosen, rejected, beta, mask, denominator)
    return jnp.asarray(nll, jnp.float32) + beta * batch_mean(losses, mask, denominator), metrics


def kto_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    kl,
    *,
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    chosen_mask=None,
    rejected_mask=None,
    denominator=None,
):
    """Kahneman-Tversky optimization on desirable and undesirable responses, a mean over both.

        z = max(0, kl), without gradient
        desirable_weight   * (1 - sigmoid(beta * (policy_chosen - ref_chosen - z)))
        undesirable_weight * (1 - sigmoid(beta * (z - (policy_rejected - ref_rejected))))

    Args:
      policy_chosen: float[C], log-probabilities of the desirable responses under the policy in
        training, in nats: sums over their tokens. C may be 0.
      policy_rejected: float[R], the same for the undesirable ones; R may differ from C.
      ref_chosen: float[C], log-probabilities of the desirable ones under the reference.
      ref_rejected: float[R], the same for the undesirable ones.
      kl: float[], the reference point, in nats per response: an estimate of the KL divergence of
        the policy from the reference. The published estimate is the mean of policy - ref over
        responses paired with other prompts.
      beta: strength of the KL constraint to the reference.
      desirable_weight: weight of the desirable responses.
      undesirable_weight: weight of the undesirable ones.
      chosen_mask: bool[C], False on padding entries of the batch; None: all are real.
      rejected_mask: bool[R], the same for the undesirable ones.
      denominator: divisors of the sums: the numbers of (desirable, undesirable) responses in the
        large batch. A single number N is short for (N / 2, N / 2).

    Returns:
      (loss, metrics), f32[] each. A reward is beta * (policy - ref); metrics `accuracy`, the share
      of all responses on the right side of the reference point, with policy - ref above z if
      desirable and below if not (ties count as wrong), `chosen_reward` and `rejected_reward`, the
      mean of each group over its own number, and `margin`, the difference of these means. 0 if no
      response is real. With a pair as denominator all of them add up over micro-batches; with a
      single number only loss and accuracy do, and the rewards if the two groups are equally large.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Ethayarajh et al., KTO, section 4.1 (arXiv:2402.01306).

    >>> loss, metrics = kto_loss(
    ...     jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([-3.0]), jnp.array([-3.0]), kl=1.0,
    ...     beta=1.0)
    >>> print(f"{loss:.4f}", metrics["accuracy"], metrics["margin"])
    0.2689 1.0 2.0
    """
    expect_scalars(
        kl=kl,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    chosen_mask, policy_chosen, ref_chosen = _masked(
        chosen_mask, "C", "chosen_mask", policy_chosen=policy_chosen, ref_chosen=ref_chosen
    )
    rejected_mask, policy_rejected, ref_rejected = _masked(
        rejected_mask,
        "R",
        "rejected_mask",
        policy_rejected=policy_rejected,
        ref_rejected=ref_rejected,
    )
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    # Distances from the reference point, positive on the right side.
    z = jnp.maximum(jax.lax.stop_gradient(jnp.asarray(kl, jnp.float32)), 0.0)
    above, below = chosen - z, z - rejected
    chosen_count, rejected_count, count = _counts(chosen_mask, rejected_mask, denominator)
    desirable = batch_mean(jax.nn.sigmoid(-beta * above), chosen_mask, count)
    undesirable = batch_mean(jax.nn.sigmoid(-beta * below), rejected_mask, count)
    chosen_reward = batch_mean(beta * chosen, chosen_mask, chosen_count)
    rejected_reward = batch_mean(beta * rejected, rejected_mask, rejected_count)
    return desirable_weight * desirable + undesirable_weight * undesirable, {
        "accuracy": batch_mean(above > 0, chosen_mask, count)
        + batch_mean(below > 0, rejected_mask, count),
        "margin": chosen_reward - rejected_reward,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
    }


def _dpo_losses(difference, beta, kind, label_smoothing):
    logits = beta * difference
    if kind in ("hinge", "ipo"):
        # relu and not maximum, which splits the gradient at the corner.
        hinge = kind == "hinge"
        losses = jax.nn.relu(1.0 - logits) if hinge else jnp.square(difference - 0.5 / beta)
        return losses * jnp.where(label_smoothing == 0, 1.0, jnp.nan)
    right, swapped = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    if kind == "robust":
        mixed = (1.0 - label_smoothing) * right - label_smoothing * swapped
        return mixed / (1.0 - 2.0 * label_smoothing)
    return (1.0 - label_smoothing) * right + label_smoothing * swapped


def _expect_label_smoothing(kind, label_smoothing):
    """Raises for values that a kind does not support; a traced value is not known."""
    if not isinstance(label_smoothing, numbers.Real):
        return
    value = float(label_smoothing)
    if kind in ("hinge", "ipo") and value != 0:
        raise ValueError(
            f"label_smoothing must be 0 with kind {kind!r}, which has none, but is {value}: use "
            "kind 'sigmoid' or 'robust', or leave it out."
        )
    if kind == "robust" and not 0 <= value < 0.5:
        raise ValueError(
            "label_smoothing must be at least 0 and below 0.5 with kind 'robust', which divides by "
            f"1 - 2 * label_smoothing, but is {value}."
        )


def _expect_lengths(policy_chosen, lengths):
    if not isinstance(lengths, tuple | list) or len(lengths) != 2:
        raise ValueError("lengths must be a pair, (chosen, rejected), of int[B] each.")
    for index, x in enumerate(lengths):
        is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        name, kind = f"lengths[{index}]", float if is_float else int
        expect(policy_chosen=(policy_chosen, "B", float), **{name: (x, "B", kind)})


def _masked(mask, axis="B", mask_name="mask", /, **logprobs):
    """(mask, *logprobs) after checks; the mask is True by default, the others are 0 off it."""
    expected = {name: (x, axis, float) for name, x in logprobs.items()}
    expect(**expected)
    if mask is None:
        mask = jnp.ones_like(next(iter(logprobs.values())), dtype=bool)
    expect(**expected, **{mask_name: (mask, axis, bool)})
    return mask, *zero_off_mask(mask, *logprobs.values())


def _pair_metrics(chosen, rejected, beta, mask, denominator):
    """Metrics of pairs whose rewards are beta * chosen and beta * rejected."""
    return {
        "accuracy": batch_mean(chosen > rejected, mask, denominator),
        "margin": batch_mean(beta * (chosen - rejected), mask, denominator),
        "chosen_reward": batch_mean(beta * chosen, mask, denominator),
        "rejected_reward": batch_mean(beta * rejected, mask, denominator),
    }


def _log_odds(logprobs):
    # Clamped before the logarithm, whose gradient at log 0 is infinite.
    logprobs = jnp.minimum(logprobs, -MIN_DISTANCE)
    return logprobs - jnp.log(-jnp.expm1(logprobs))


def _counts(chosen_mask, rejected_mask, denominator):
    """Divisors for the chosen, the rejected and all responses: f32[] each, never 0."""
    if denominator is None:
        chosen, rejected = jnp.sum(chosen_mask), jnp.sum(rejected_mask)
    else:
        counts = jnp.asarray(denominator, jnp.float32)
        if counts.shape not in ((), (2,)):
            raise ValueError(
                "denominator must be a single number or a pair of them, (desirable, undesirable), "
                f"but has the shape {counts.shape}."
            )
        chosen, rejected = counts if counts.ndim else (counts / 2, counts / 2)
    return tuple(count_or_one(count) for count in (chosen, rejected, chosen + rejected))
