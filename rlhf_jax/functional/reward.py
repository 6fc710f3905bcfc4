"""Losses of reward models on comparisons."""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.expect import expect, expect_one_of, expect_scalars
from rlhf_jax.functional.masking import batch_mean, is_last, masked_mean, zero_off_mask

PAST_END = ("last", "published")


def pairwise_loss(chosen, rejected, *, margin=0.0, center_coef=0.0, mask=None, denominator=None):
    """Negative log-likelihood of the preferences under the Bradley-Terry model, a mean over pairs.

        -log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2

    Args:
      chosen: float[B], scores of the preferred responses.
      rejected: float[B], scores of the other responses.
      margin: required difference of the scores, a number or float[B].
      center_coef: weight of the term that drives the sum of the two scores to 0.
      mask: bool[B], False on padding entries of the batch; None: all are real.
      denominator: divisor of the sums, instead of the number of real pairs.

    Returns:
      (loss, metrics), f32[] each; metrics `accuracy`, the share of pairs in which the chosen one
      scores higher (ties count as wrong), and `margin`, the mean of chosen - rejected. All are 0
      if no pair is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Ouyang et al., InstructGPT, eq. 1 with K = 2 (arXiv:2203.02155); margin: Touvron et al.,
    Llama 2, eq. 2 (arXiv:2307.09288); centring: Eisenstein et al., eq. 2 (arXiv:2312.09244).

    >>> loss, metrics = pairwise_loss(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0]))
    >>> print(f"{loss:.4f}", metrics["accuracy"], metrics["margin"])
    1.2201 0.5 -0.5
    """
    expect(chosen=(chosen, "B", float), rejected=(rejected, "B", float))
    mask = jnp.ones_like(chosen, dtype=bool) if mask is None else mask
    expect(chosen=(chosen, "B", float), mask=(mask, "B", bool))
    expect_scalars(center_coef=center_coef)
    margin = jnp.asarray(margin)
    if margin.ndim > 0:
        expect(chosen=(chosen, "B", float), margin=(margin, "B", float))
    chosen, rejected, margin = zero_off_mask(mask, chosen, rejected, margin)
    difference = chosen - rejected
    losses = center_coef * jnp.square(chosen + rejected) - jax.nn.log_sigmoid(difference - margin)
    return batch_mean(losses, mask, denominator), {
        "accuracy": batch_mean(difference > 0, mask, denominator),
        "margin": batch_mean(difference, mask, denominator),
    }


def tokenwise_pairwise_loss(
    chosen_scores,
    rejected_scores,
    chosen_tokens,
    rejected_tokens,
    chosen_mask,
    rejected_mask,
    *,
    past_end="last",
    mask=None,
    denominator=None,
):
    """`pairwise_loss` at each token from the first difference of two responses to their common end.

        loss = mean_t -log sigmoid(chosen_t - rejected_t),     first <= t < end

    `first` is the first position at which the responses differ, in a token or in the mask; `end` is
    the end of the longer one, the common end. The loss is the mean over pairs of these means.
    Past its own end, and at any other masked position, a response has no token. There it keeps the
    score at its last token before ("last"), or has the score on its padding ("published"), as in
    the published code. In the latter case the score must be finite, and it depends on the padding
    token and on the attention to it.

    Args:
      chosen_scores: float[B, T], a score at each token of the preferred responses.
      rejected_scores: float[B, T], the same for the other responses.
      chosen_tokens: int[B, T], the responses, optionally after a prompt that both share.
      rejected_tokens: int[B, T].
      chosen_mask: bool[B, T], True on real tokens.
      rejected_mask: bool[B, T], the same.
      past_end: "last" or "published".
      mask: bool[B], False on padding entries of the batch; None: all are real. A pair
        without a real token is not real either.
      denominator: divisor of the sums, instead of the number of real pairs.

    Returns:
      (loss, metrics): f32[], and f32[] each but for the end scores. Metrics `accuracy`, the share
      of pairs in which the chosen one has the higher end score (ties count as wrong), `margin`, the
      mean difference of the end scores, `chosen_end_scores` and `rejected_end_scores`, f32[B], the
      scores at the common end, and `no_difference`, the share of pairs of equal responses. Those
      contribute 0 to the loss, accuracy and margin, and are part of the denominator. A response
      without a real token scores 0. All are 0 if no pair is real.

      Padding beyond the common end has no effect; under "last", no padding has.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, or an unknown past_end.

    The reward model of trlX's summarization example (CarperAI/trlx,
    examples/summarize_rlhf/reward_model), whose training follows Stiennon et al., Learning to
    Summarize from Human Feedback, section 3.4 (arXiv:2009.01325), except that the paper uses only
    the last score of a response.

    >>> loss, metrics = tokenwise_pairwise_loss(
    ...     jnp.array([[5.0, 2.0, 3.0]]), jnp.array([[5.0, 2.0, jnp.nan]]),
    ...     jnp.array([[7, 8, 0]]), jnp.array([[7, 9, -1]]),
    ...     jnp.array([[True, True, True]]), jnp.array([[True, True, False]]))
    >>> print(f"{loss:.4f}")  # (log 2 - log sigmoid(1)) / 2
    0.5032
    >>> print(metrics["chosen_end_scores"], metrics["rejected_end_scores"], metrics["margin"])
    [3.] [2.] 1.0
    """
    expect(
        chosen_scores=(chosen_scores, "BT", float),
        rejected_scores=(rejected_scores, "BT", float),
        chosen_tokens=(chosen_tokens, "BT", int),
        rejected_tokens=(rejected_tokens, "BT", int),
        chosen_mask=(chosen_mask, "BT", bool),
        rejected_mask=(rejected_mask, "BT", bool),
    )
    expect_one_of(past_end=(past_end, PAST_END))
    if mask is not None:
        expect(chosen_scores=(chosen_scores, "BT", float), mask=(mask, "B", bool))
        chosen_mask, rejected_mask = chosen_mask & mask[:, None], rejected_mask & mask[:, None]
    either = chosen_mask | rejected_mask
    # Where only one of them is real they differ, whatever the padding token of the other one.
    differ = (chosen_mask != rejected_mask) | (either & (chosen_tokens != rejected_tokens))
    counted = either & (jnp.cumsum(differ, axis=1) > 0)
    if past_end == "last":
        chosen = _extended_past_end(chosen_scores, chosen_mask)
        rejected = _extended_past_end(rejected_scores, rejected_mask)
    else:
        chosen, rejected = zero_off_mask(either, chosen_scores, rejected_scores)
    losses = masked_mean(-jax.nn.log_sigmoid(chosen - rejected), counted, axis=1)
    chosen_end, rejected_end = (
        jnp.sum(x, axis=1) for x in zero_off_mask(is_last(either), chosen, rejected)
    )
    pairs, different = jnp.any(either, axis=1), jnp.any(counted, axis=1)
    margins = jnp.where(different, chosen_end - rejected_end, 0.0)
    return batch_mean(losses, pairs, denominator), {
        "accuracy": batch_mean(margins > 0, pairs, denominator),
        "margin": batch_mean(margins, pairs, denominator),
        "chosen_end_scores": chosen_end,
        "rejected_end_scores": rejected_end,
        "no_difference": batch_mean(~different, pairs, denominator),
    }


def ranking_loss(scores, mask, *, denominator=None):
    """Negative log-likelihood of the pairs of each prompt's ranking, a mean over prompts.

        loss = mean_{i < j} -log sigmoid(score_i - score_j)        over the real i, j of a prompt

    Each prompt has the same weight, for any number of responses.

    Args:
      scores: float[B, K], for K responses to each of B prompts, the best response first.
      mask: bool[B, K], True on real responses.
      denominator: divisor of the sums, instead of the number of prompts with at least two real
        responses.

    Returns:
      (loss, metrics), f32[] each; metrics `accuracy`, the mean over prompts of the share of their
      pairs in which the better response scores higher (ties count as wrong), and `margin`, the mean
      over prompts of the mean difference of their pairs. All are 0 if there is no pair.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Ouyang et al., InstructGPT, eq. 1 (arXiv:2203.02155).

    >>> loss, metrics = ranking_loss(
    ...     jnp.array([[2.0, 1.0, 1.0], [0.0, 2.0, jnp.nan]]),
    ...     jnp.array([[True, True, True], [True, True, False]]))
    >>> print(f"{loss:.4f}", f"{metrics['accuracy']:.4f}")
    1.2834 0.3333
    """
    expect(scores=(scores, "BK", float), mask=(mask, "BK", bool))
    (scores,) = zero_off_mask(mask, scores)
    rank = jnp.arange(mask.shape[1])
    pairs = mask[:, :, None] & mask[:, None, :] & (rank[:, None] < rank)
    difference = scores[:, :, None] - scores[:, None, :]
    losses = masked_mean(-jax.nn.log_sigmoid(difference), pairs, axis=(1, 2))
    correct = masked_mean((difference > 0).astype(jnp.float32), pairs, axis=(1, 2))
    margins = masked_mean(difference, pairs, axis=(1, 2))
    prompts = jnp.any(pairs, axis=(1, 2))
    return batch_mean(losses, prompts, denominator), {
        "accuracy": batch_mean(correct, prompts, denominator),
        "margin": batch_mean(margins, prompts, denominator),
    }


def _extended_past_end(scores, mask):
    """f32[B, T]: the scores, with the last real one before repeated on masked positions."""
    (scores,) = zero_off_mask(mask, scores)

    def step(last, position):
        score, is_real = position
        last = jnp.where(is_real, score, last)
        return last, last

    zeros = jnp.zeros_like(jnp.sum(scores, axis=1))
    return jax.lax.scan(step, zeros, (scores.T, mask.T))[1].T
