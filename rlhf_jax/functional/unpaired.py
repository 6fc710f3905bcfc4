"""Losses of a policy on responses that are each desirable or not, without pairs.

Their arguments are log-probabilities of full responses, one number each.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.dpo_kinds import softplus
from rlhf_jax.functional.expect import expect_one_of, expect_scalars
from rlhf_jax.functional.masking import batch_mean, count_or_one
from rlhf_jax.functional.pairs import masked_responses

KTO_KINDS = ("kto", "apo_zero_unpaired")


def kto_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    kl=None,
    *,
    beta=0.1,
    kind="kto",
    desirable_weight=1.0,
    undesirable_weight=1.0,
    chosen_mask=None,
    rejected_mask=None,
    denominator=None,
):
    """Kahneman-Tversky optimization of desirable and undesirable responses, a mean over both.

        z = max(0, kl), without gradient;    z = 0 for "apo_zero_unpaired"
        desirable_weight   * (1 - sigmoid(beta * (policy_chosen - ref_chosen - z)))
        undesirable_weight * (1 - sigmoid(beta * (z - (policy_rejected - ref_rejected))))

    Args:
      policy_chosen: float[C], log-probabilities of the desirable responses under the policy in
        training, in nats: sums over their tokens. C may be 0.
      policy_rejected: float[R], the same for the undesirable ones; R may differ from C.
      ref_chosen: float[C], log-probabilities of the desirable ones under the reference.
      ref_rejected: float[R], the same for the undesirable ones.
      kl: float[], the reference point of "kto", in nats per response: an estimate of the KL
        divergence of the policy from the reference. The published estimate is the mean of
        policy - ref over responses paired with other prompts, of the large batch.
      beta: strength of the KL constraint to the reference.
      kind: "kto", or "apo_zero_unpaired", which has no reference point.
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
      ValueError: naming the argument whose shape or dtype is wrong, an unknown kind, a missing kl,
        or one that the kind does not read.

    Ethayarajh et al., KTO, section 4.1 (arXiv:2402.01306); apo_zero_unpaired: as in TRL, eq. 7 of
    D'Oosterlinck et al. (arXiv:2408.06266) without pairs.

    >>> loss, metrics = kto_loss(
    ...     jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([-3.0]), jnp.array([-3.0]), kl=1.0,
    ...     beta=1.0)
    >>> print(f"{loss:.4f}", metrics["accuracy"], metrics["margin"])
    0.2689 1.0 2.0
    """
    expect_one_of(kind=(kind, KTO_KINDS))
    expect_scalars(
        kl=kl,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    if (kind == "kto") != (kl is not None):
        raise ValueError(
            f"kl must be given with kind 'kto', and with no other, but kind is {kind!r} and kl is "
            f"{'None' if kl is None else 'given'}."
        )
    chosen_mask, rejected_mask, chosen, rejected = _log_ratios(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask
    )
    counts = _counts(chosen_mask, rejected_mask, denominator)
    z = 0.0 if kl is None else jnp.maximum(jax.lax.stop_gradient(jnp.asarray(kl, jnp.float32)), 0.0)
    desirable = batch_mean(jax.nn.sigmoid(-beta * (chosen - z)), chosen_mask, counts[2])
    undesirable = batch_mean(jax.nn.sigmoid(-beta * (z - rejected)), rejected_mask, counts[2])
    metrics = _metrics(chosen, rejected, z, beta, chosen_mask, rejected_mask, counts)
    return desirable_weight * desirable + undesirable_weight * undesirable, metrics


def bco_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    delta=None,
    *,
    beta=0.1,
    chosen_mask=None,
    rejected_mask=None,
    denominator=None,
):
    """Binary classifier optimization of desirable and undesirable responses, a mean over both.

        -log sigmoid(beta * (policy_chosen - ref_chosen) - delta)
        -log sigmoid(delta - beta * (policy_rejected - ref_rejected))

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: float[C] and float[R], as in
        `kto_loss`.
      delta: float[], the reward shift, without a gradient. TRL's is the mean reward of all
        responses so far, those of this batch included. None: of this batch, as in TRL's first
        step.
      beta, chosen_mask, rejected_mask: as in `kto_loss`.
      denominator: as in `kto_loss`. It needs a delta, since the mean reward of a part of the batch
        is not that of the batch.

    Returns:
      (loss, metrics), f32[] each, with the metrics of `kto_loss`; the right side is a reward above
      delta if desirable and below if not. 0 if no response is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, or a denominator without a
        delta.

    Jung et al., Binary Classifier Optimization (arXiv:2404.04656), without the weights for
    different distributions of prompts.

    >>> loss, metrics = bco_loss(
    ...     jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([-2.0]), jnp.array([-2.0]), beta=0.5)
    >>> print(f"{loss:.4f}", metrics["accuracy"])
    0.4741 1.0
    """
    expect_scalars(delta=delta, beta=beta)
    chosen_mask, rejected_mask, chosen, rejected = _log_ratios(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask
    )
    counts = _counts(chosen_mask, rejected_mask, denominator)
    if delta is None:
        if denominator is not None:
            raise ValueError("delta must be given with a denominator: it is a mean over the batch.")
        delta = beta * batch_mean(chosen, chosen_mask, counts[2])
        delta += beta * batch_mean(rejected, rejected_mask, counts[2])
    delta = jax.lax.stop_gradient(jnp.asarray(delta, jnp.float32))
    desirable = batch_mean(softplus(delta - beta * chosen), chosen_mask, counts[2])
    undesirable = batch_mean(softplus(beta * rejected - delta), rejected_mask, counts[2])
    metrics = _metrics(chosen, rejected, delta / beta, beta, chosen_mask, rejected_mask, counts)
    return desirable + undesirable, metrics


def _log_ratios(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask
):
    """(chosen_mask, rejected_mask, log-ratios of the chosen, of the rejected), after checks."""
    chosen_mask, policy_chosen, ref_chosen = masked_responses(
        chosen_mask, "C", "chosen_mask", policy_chosen=policy_chosen, ref_chosen=ref_chosen
    )
    rejected_mask, policy_rejected, ref_rejected = masked_responses(
        rejected_mask,
        "R",
        "rejected_mask",
        policy_rejected=policy_rejected,
        ref_rejected=ref_rejected,
    )
    return chosen_mask, rejected_mask, policy_chosen - ref_chosen, policy_rejected - ref_rejected


def _metrics(chosen, rejected, reference_point, beta, chosen_mask, rejected_mask, counts):
    """Metrics of log-ratios, of which the chosen should be above the reference point."""
    chosen_count, rejected_count, count = counts
    chosen_reward = batch_mean(beta * chosen, chosen_mask, chosen_count)
    rejected_reward = batch_mean(beta * rejected, rejected_mask, rejected_count)
    return {
        "accuracy": batch_mean(chosen > reference_point, chosen_mask, count)
        + batch_mean(rejected < reference_point, rejected_mask, count),
        "margin": chosen_reward - rejected_reward,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
    }


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
