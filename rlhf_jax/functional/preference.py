"""Direct preference optimization: losses of a policy and its reference on pairs of responses.

Their arguments are log-probabilities of full responses, one number each.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.dpo_kinds import divergence_scores, pair_losses, sorted_losses
from rlhf_jax.functional.expect import expect, expect_one_of, expect_scalars
from rlhf_jax.functional.masking import batch_mean, zero_off_mask
from rlhf_jax.functional.pairs import expect_label_smoothing, masked_responses, pair_metrics
from rlhf_jax.preference_kinds import (
    BATCH_KINDS,
    DIVERGENCE_KINDS,
    DIVERGENCES,
    DPO_KINDS,
    SMOOTHED_KINDS,
)


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
    divergence="reverse_kl",
    divergence_alpha=0.5,
    discopop_tau=0.05,
    nll=None,
    weights=None,
    mask=None,
    denominator=None,
):
    """Direct preference optimization and its variants, a mean over pairs.

        c = policy_chosen - ref_chosen,    r = policy_rejected - ref_rejected,    h = c - r
        S = sigmoid,    s = label_smoothing,    q = S(beta * h),    m = S(beta * h / discopop_tau)

        sigmoid       -(1 - s) * log S(beta * h) - s * log S(-beta * h)
        robust        (-(1 - s) * log S(beta * h) + s * log S(-beta * h)) / (1 - 2 * s)
        hinge         max(0, 1 - beta * h)
        ipo           (h - 1 / (2 * beta))^2
        exo_pair      q * log(q / (1 - s)) + (1 - q) * log((1 - q) / s)
        nca_pair      -log S(beta * c) - log S(-beta * c) / 2 - log S(-beta * r) / 2
        bco_pair      -log S(beta * c) - log S(-beta * r)
        sppo_hard     (c - 1 / (2 * beta))^2 + (r + 1 / (2 * beta))^2
        apo_zero      1 - S(beta * c) + S(beta * r)
        apo_down      S(beta * c) + 1 - S(beta * h)
        discopop      -(1 - m) * log S(beta * h) + m * exp(-beta * h)
        aot           "sigmoid" of sort(policy_chosen - policy_rejected)
                      - sort(ref_chosen - ref_rejected) instead of h, both sorted over the batch
        aot_unpaired  "sigmoid" of sort(c) - sort(r) instead of h
        sft           nll

    s is the assumed share of pairs with swapped labels. "sigmoid" with s > 0 is conservative DPO,
    with a target probability of 1 - s, which TRL's "sigmoid" ignores; the expectation of "robust"
    over swaps is the loss of the true labels. "exo_pair" is KL((q, 1 - q) || (1 - s, s)), infinite
    at s = 0. "sppo_hard" is SPPO with a probability of 1 that the chosen response wins, "bco_pair"
    is BCO without its reward shift, as in TRL. "discopop" is not monotonic: as published, with
    discopop_tau = 0.05, its derivative by beta * h is +0.78 at h = 0, so that at the start of
    training it lowers the margins, to its minimum at a negative one.

    With another divergence than the reverse KL, c and r are f'(e^c) and f'(e^r), as scores that
    are 0 where policy and reference agree; t is e^c or e^r:

        forward_kl        1 - 1 / t
        js_divergence     log(2 * t / (1 + t))
        alpha_divergence  (t^(divergence_alpha - 1) - 1) / (divergence_alpha - 1)

    Their exponents are limited to 30, beyond which the gradient is 0. An unknown constant cancels
    in h alone, so that the other kinds refuse a divergence, as TRL does after 0.29. The
    divergence_alpha is that of TRL's code, 1 - alpha in the paper: 1 is the reverse, 0 the forward
    KL.

    Args:
      policy_chosen: float[B], log-probabilities of the preferred responses under the policy in
        training, in nats: sums over their tokens.
      policy_rejected: float[B], the same for the other responses.
      ref_chosen: float[B], log-probabilities of the preferred ones under the reference.
      ref_rejected: float[B], the same for the others.
      beta: strength of the KL constraint to the reference (the paper's tau for "ipo").
      kind: one of the kinds above.
      label_smoothing: s. "exo_pair" needs a value in (0, 1), its paper's is 0.001; "robust" one in
        [0, 0.5). Kinds without s refuse another value than 0; a traced one makes their loss NaN.
      lengths: (int[B], int[B]), tokens of the chosen and of the rejected responses, or floats: c
        and r, or the log-probabilities that "aot" sorts, are divided by them, or by 1 for an empty
        response. TRL does this for "ipo", as advised by its authors; their paper, and OpenRLHF, do
        not. None: sums.
      divergence: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
      divergence_alpha: of "alpha_divergence".
      discopop_tau: of "discopop".
      nll: float[], the supervised loss on the preferred responses, of "sft" alone. It is returned
        unchanged: for micro-batches it has to be divided by the count of the large batch.
      weights: float[B], a factor of each pair's loss, without a gradient: products of both
        responses' `wpo_weights`. Kinds that sort refuse them, and "sft" does.
      mask: bool[B], False on padding entries of the batch; None: all are real.
      denominator: divisor of the sums, instead of the number of real pairs. Micro-batches of "aot"
        and "aot_unpaired" (BATCH_KINDS) do not add up: they sort within each.

    Returns:
      (loss, metrics), f32[] each. A reward is beta * (policy - ref), per token with lengths;
      metrics `accuracy`, the share of pairs in which the chosen one has the higher reward (ties
      count as wrong), `margin`, the mean difference of rewards, `chosen_reward` and
      `rejected_reward`, their means. All are 0 if no pair is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, an unknown kind or divergence,
        or an argument that the kind needs or does not support.

    Rafailov et al., Direct Preference Optimization, eq. 7 (arXiv:2305.18290); conservative:
    Mitchell, A note on DPO with noisy preferences (ericmitchell.ai/cdpo.pdf); robust: Ray Chowdhury
    et al., Provably Robust DPO, section 3.1 (arXiv:2403.00409); hinge: the loss of Zhao et al.,
    SLiC-HF, section 2 (arXiv:2305.10425) on log-ratios, as in Liu et al., Statistical Rejection
    Sampling (arXiv:2309.06657); ipo: Gheshlaghi Azar et al., eq. 17 (arXiv:2310.12036); exo_pair:
    Ji et al., eq. 16 (arXiv:2402.00856); nca_pair: Chen et al. (arXiv:2402.05369); bco_pair: Jung
    et al. (arXiv:2404.04656); sppo_hard: Wu et al., eq. 4.7 (arXiv:2405.00675); apo: D'Oosterlinck
    et al., eq. 7 and 8 (arXiv:2408.06266); discopop: Lu et al., eq. 5 (arXiv:2406.08414); aot:
    Melnyk et al. (arXiv:2406.05882); divergences: Wang et al., Beyond Reverse KL
    (arXiv:2309.16240).

    >>> loss, metrics = dpo_loss(
    ...     jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([-2.0]), jnp.array([-2.0]), beta=0.5)
    >>> print(f"{loss:.4f}", metrics["margin"], metrics["chosen_reward"])
    0.3133 1.0 0.5
    """
    _expect_arguments(kind, label_smoothing, divergence, nll, weights)
    expect_scalars(
        beta=beta,
        label_smoothing=label_smoothing,
        divergence_alpha=divergence_alpha,
        discopop_tau=discopop_tau,
        nll=nll,
    )
    mask, *logprobs = masked_responses(
        mask,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = logprobs
    log_ratios = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    per_chosen, per_rejected = _divisors(policy_chosen, lengths, mask)
    chosen, rejected = log_ratios[0] / per_chosen, log_ratios[1] / per_rejected
    metrics = pair_metrics(chosen, rejected, beta, mask, denominator)
    if kind == "sft":
        loss = jnp.asarray(nll, jnp.float32)
    elif kind in BATCH_KINDS:
        above, below = chosen, rejected
        if kind == "aot":
            above = policy_chosen / per_chosen - policy_rejected / per_rejected
            below = ref_chosen / per_chosen - ref_rejected / per_rejected
        losses, mask = sorted_losses(above, below, mask, beta, label_smoothing)
        loss = batch_mean(losses, mask, denominator)
    else:
        scores = [divergence_scores(x, divergence, divergence_alpha) for x in log_ratios]
        chosen, rejected = scores[0] / per_chosen, scores[1] / per_rejected
        losses = pair_losses(kind, chosen, rejected, beta, label_smoothing, discopop_tau)
        loss = batch_mean(losses * _factors(policy_chosen, weights, mask), mask, denominator)
    if kind not in SMOOTHED_KINDS:
        loss *= jnp.where(label_smoothing == 0, 1.0, jnp.nan)
    return loss, metrics


def mixed_dpo_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    *,
    kinds=("sigmoid",),
    kind_weights=None,
    beta=0.1,
    label_smoothing=0.0,
    lengths=None,
    divergence="reverse_kl",
    divergence_alpha=0.5,
    discopop_tau=0.05,
    nll=None,
    weights=None,
    mask=None,
    denominator=None,
):
    """A weighted sum of kinds of `dpo_loss`, with arguments and metrics as TRL's DPOTrainer has.

        sum_i kind_weights[i] * dpo_loss(kind=kinds[i])

    ("sigmoid", "sft") is DPO with the likelihood term of RPO, ("sigmoid", "bco_pair", "sft") with
    weights (0.8, 0.2, 1) is MPO.

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: float[B], as in `dpo_loss`: sums.
      kinds: tuple of kinds of `dpo_loss`.
      kind_weights: tuple of as many numbers; None: 1 for each.
      beta, divergence, divergence_alpha, discopop_tau: as in `dpo_loss`, for all kinds.
      label_smoothing: of the kinds that have it, "sigmoid" among them, unlike in TRL; at least one
        if it is not 0.
      lengths: as in `dpo_loss`, of "ipo" alone.
      nll: float[], of "sft" alone, which needs it.
      weights: float[B], as in `dpo_loss`, of all kinds but "sft", which TRL multiplies by their
        mean: parts of a batch would not add up.
      mask, denominator: as in `dpo_loss`.

    Returns:
      (loss, metrics), f32[] each, with the metrics of `dpo_loss` without lengths: a reward is
      beta * (policy - ref), of sums for "ipo" too.

    Raises:
      ValueError: as `dpo_loss`, or if kinds or kind_weights are no such tuples.

    RPO: Pang et al., Iterative Reasoning Preference Optimization (arXiv:2404.19733); MPO: Wang et
    al., Mixed Preference Optimization (arXiv:2411.10442).

    >>> logprobs = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> loss, _ = mixed_dpo_loss(
    ...     *logprobs, kinds=("sigmoid", "sft"), kind_weights=(1.0, 0.5), beta=0.5, nll=1.0)
    >>> print(f"{loss:.4f}")
    0.8133
    """
    kind_weights = _expect_kinds(kinds, kind_weights)
    if not SMOOTHED_KINDS & set(kinds):
        expect_label_smoothing(kinds[0], label_smoothing, SMOOTHED_KINDS)
    if "sft" not in kinds and nll is not None:
        raise ValueError(f"nll must be None without the kind 'sft', but kinds is {kinds!r}.")
    logprobs = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    common = {"beta": beta, "mask": mask, "denominator": denominator}
    _, metrics = dpo_loss(*logprobs, **common)
    total = jnp.zeros((), jnp.float32)
    for kind, kind_weight in zip(kinds, kind_weights, strict=True):
        loss, _ = dpo_loss(
            *logprobs,
            kind=kind,
            label_smoothing=label_smoothing if kind in SMOOTHED_KINDS else 0.0,
            lengths=lengths if kind == "ipo" else None,
            divergence=divergence,
            divergence_alpha=divergence_alpha,
            discopop_tau=discopop_tau,
            nll=nll if kind == "sft" else None,
            weights=None if kind == "sft" else weights,
            **common,
        )
        total += kind_weight * loss
    return total, metrics


def _divisors(policy_chosen, lengths, mask):
    """Lengths of the chosen and the rejected responses, at least 1; (1, 1) without lengths."""
    if lengths is None:
        return 1.0, 1.0
    if not isinstance(lengths, tuple | list) or len(lengths) != 2:
        raise ValueError("lengths must be a pair, (chosen, rejected), of int[B] each.")
    for index, x in enumerate(lengths):
        is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        name, kind = f"lengths[{index}]", float if is_float else int
        expect(policy_chosen=(policy_chosen, "B", float), **{name: (x, "B", kind)})
    return tuple(jnp.maximum(x, 1.0) for x in zero_off_mask(mask, *lengths))


def _factors(policy_chosen, weights, mask):
    if weights is None:
        return 1.0
    expect(policy_chosen=(policy_chosen, "B", float), weights=(weights, "B", float))
    return jax.lax.stop_gradient(zero_off_mask(mask, weights)[0])


def _expect_arguments(kind, label_smoothing, divergence, nll, weights):
    """Raises for arguments that a kind does not support or that it needs."""
    expect_one_of(kind=(kind, DPO_KINDS), divergence=(divergence, DIVERGENCES))
    expect_label_smoothing(kind, label_smoothing, SMOOTHED_KINDS)
    if divergence != "reverse_kl" and kind not in DIVERGENCE_KINDS:
        allowed = ", ".join(map(repr, DIVERGENCE_KINDS))
        raise ValueError(
            f"divergence must be 'reverse_kl' with kind {kind!r}, but is {divergence!r}: others go "
            f"with {allowed}."
        )
    if (kind == "sft") != (nll is not None):
        raise ValueError(
            f"nll must be given with kind 'sft', and with no other, but kind is {kind!r} and nll "
            f"is {'None' if nll is None else 'given'}."
        )
    if weights is not None and kind in (*BATCH_KINDS, "sft"):
        reason = "whose loss is no mean over pairs" if kind == "sft" else "which sorts the batch"
        raise ValueError(f"weights must be None with kind {kind!r}, {reason}.")


def _expect_kinds(kinds, kind_weights):
    """The weights of the kinds, after checks."""
    if not isinstance(kinds, tuple) or not kinds:
        raise ValueError(f"kinds must be a tuple of kinds of dpo_loss, but is {kinds!r}.")
    for index, kind in enumerate(kinds):
        expect_one_of(**{f"kinds[{index}]": (kind, DPO_KINDS)})
    if kind_weights is None:
        return (1.0,) * len(kinds)
    if not isinstance(kind_weights, tuple | list) or len(kind_weights) != len(kinds):
        raise ValueError(f"kind_weights must be a tuple of {len(kinds)} numbers, as many as kinds.")
    expect_scalars(**{f"kind_weights[{i}]": weight for i, weight in enumerate(kind_weights)})
    return kind_weights
