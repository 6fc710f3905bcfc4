"""Losses of a policy on preferences that need no reference.

Their arguments are log-probabilities of full responses, one number each.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.dpo_kinds import difference_losses
from rlhf_jax.functional.expect import expect_one_of, expect_scalars
from rlhf_jax.functional.masking import batch_mean
from rlhf_jax.functional.pairs import expect_label_smoothing, masked_responses, pair_metrics

CPO_KINDS = ("sigmoid", "hinge", "ipo")

# float32's epsilon: a probability with a logarithm closer to 0 rounds to 1.
MIN_DISTANCE = 2.0**-23


def simpo_loss(
    policy_chosen,
    policy_rejected,
    *,
    beta=2.0,
    gamma=1.0,
    label_smoothing=0.0,
    mask=None,
    denominator=None,
):
    """Simple preference optimization: no reference, means per token; a mean over pairs.

        z = beta * (policy_chosen - policy_rejected) - gamma
        -(1 - s) * log sigmoid(z) - s * log sigmoid(-z),    s = label_smoothing

    Args:
      policy_chosen: float[B], log-probabilities of the preferred responses under the policy in
        training, in nats per token: means over their tokens.
      policy_rejected: float[B], the same for the other responses.
      beta: scale of the rewards.
      gamma: target margin of the rewards. Some implementations have gamma / beta instead.
      label_smoothing: s, as in "sigmoid" of `dpo_loss`: not in the paper, but in TRL.
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
    mask, chosen, rejected = masked_responses(
        mask, policy_chosen=policy_chosen, policy_rejected=policy_rejected
    )
    expect_scalars(beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    z = beta * (chosen - rejected) - gamma
    losses = difference_losses("sigmoid", z, 1.0, label_smoothing)
    metrics = pair_metrics(chosen, rejected, beta, mask, denominator)
    return batch_mean(losses, mask, denominator), metrics


def cpo_loss(
    policy_chosen,
    policy_rejected,
    nll,
    *,
    beta=0.1,
    kind="sigmoid",
    label_smoothing=0.0,
    nll_weight=1.0,
    mask=None,
    denominator=None,
):
    """Contrastive preference optimization: `dpo_loss` without a reference, plus a likelihood loss.

        nll_weight * nll + mean(kind(h)),    h = policy_chosen - policy_rejected

    with "sigmoid", "hinge" or "ipo" of `dpo_loss`.

    Args:
      policy_chosen: float[B], log-probabilities of the preferred responses under the policy in
        training, in nats: sums over their tokens; TRL takes means per token for "ipo".
      policy_rejected: float[B], the same for the other responses.
      nll: float[], the supervised loss on the preferred responses, without their prompts. For
        micro-batches it has to be divided by the count of the large batch, as by
        `cross_entropy_loss` with a denominator.
      beta: scale of the log-probabilities.
      kind: "sigmoid", as published, "hinge" or "ipo".
      label_smoothing: s of "sigmoid", as in `dpo_loss`; the others have none.
      nll_weight: weight of the likelihood loss, 1 as published.
      mask: bool[B], False on padding entries of the batch; None: all are real.
      denominator: divisor of the sums over pairs, instead of the number of real pairs.

    Returns:
      (loss, metrics), f32[] each, with the metrics of `dpo_loss`, for rewards of beta times a
      log-probability. If no pair is real the loss is nll_weight * nll and the metrics are 0.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, an unknown kind, or a
        label_smoothing that the kind does not support, if it is not traced.

    Xu et al., Contrastive Preference Optimization, eq. 3 and 4 (arXiv:2401.08417).

    >>> loss, _ = cpo_loss(jnp.array([-1.0]), jnp.array([-3.0]), 1.0, beta=0.5)
    >>> print(f"{loss:.4f}")
    1.3133
    """
    expect_one_of(kind=(kind, CPO_KINDS))
    expect_scalars(nll=nll, beta=beta, label_smoothing=label_smoothing, nll_weight=nll_weight)
    expect_label_smoothing(kind, label_smoothing, ("sigmoid",))
    mask, chosen, rejected = masked_responses(
        mask, policy_chosen=policy_chosen, policy_rejected=policy_rejected
    )
    losses = difference_losses(kind, chosen - rejected, beta, label_smoothing)
    if kind != "sigmoid":
        losses *= jnp.where(label_smoothing == 0, 1.0, jnp.nan)
    metrics = pair_metrics(chosen, rejected, beta, mask, denominator)
    return nll_weight * nll + batch_mean(losses, mask, denominator), metrics


def orpo_loss(policy_chosen, policy_rejected, nll, *, beta=0.1, mask=None, denominator=None):
    """Odds ratio preference optimization: the likelihood loss plus a mean over pairs.

        log_odds(x) = log(e^x / (1 - e^x)) = x - log(1 - e^x)
        nll - beta * mean(log sigmoid(log_odds(policy_chosen) - log_odds(policy_rejected)))

    The odds of a response with probability 1 are infinite: log-probabilities above -2^-23, whose
    probability rounds to 1 in float32, are set to -2^-23, log-odds of 15.9, and have gradient 0.

    Args:
      policy_chosen, policy_rejected: float[B], means per token, as in `simpo_loss`.
      nll: float[], the supervised loss on the preferred responses; TRL's includes their prompts. It
        is added unchanged: for micro-batches it has to be divided by the count of the large batch,
        as by `cross_entropy_loss` with a denominator.
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
    mask, chosen, rejected = masked_responses(
        mask, policy_chosen=policy_chosen, policy_rejected=policy_rejected
    )
    losses = -jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))
    metrics = pair_metrics(chosen, rejected, beta, mask, denominator)
    return jnp.asarray(nll, jnp.float32) + beta * batch_mean(losses, mask, denominator), metrics


def _log_odds(logprobs):
    # Clamped before the logarithm, whose gradient at log 0 is infinite.
    logprobs = jnp.minimum(logprobs, -MIN_DISTANCE)
    return logprobs - jnp.log(-jnp.expm1(logprobs))
