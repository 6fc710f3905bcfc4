"""Scores of several responses to each prompt: advantages, length penalty, pass@k."""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.expect import expect, expect_one_of, expect_positive, expect_scalars
from rlhf_jax.functional.masking import count_or_one, zero_off_mask

SCALES = ("group", "batch", "none")


def leave_one_out_advantages(scores, mask=None):
    """Score of each response minus the mean score of the other responses to its prompt (RLOO).

        A_i = score_i - sum_{j != i} score_j / (K - 1)

    Args:
      scores: float[B, K], for K >= 2 responses to each of B prompts.
      mask: bool[B, K], True on responses with a score, the only ones that count in K; None: all.

    Returns:
      f32[B, K], zero off the mask and for the only response of a group; each group sums to 0, and
      equal scores give exactly 0.

    Raises:
      ValueError: if the shape or dtype of the arguments is wrong, or K is 1.

    Ahmadian et al., Back to Basics: Revisiting REINFORCE Style Optimization, section 2.3
    (arXiv:2402.14740), after Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free! (2019).

    >>> print(leave_one_out_advantages(jnp.array([[1.0, 2.0, 6.0]])))
    [[-3.  -1.5  4.5]]
    """
    mask = _mask_of_scores(scores, "BK", mask)
    count = jnp.sum(mask, axis=1, keepdims=True)
    return _centred(scores, mask, 1) * (count / count_or_one(count - 1))


def group_advantages(scores, mask=None, *, scale=True, eps=1e-4):
    """Scores of each prompt's responses, normalized to mean 0 and standard deviation 1 (GRPO).

        A_i = (score_i - mean) / (deviation + eps)
        deviation^2 = sum_j (score_j - mean)^2 / (K - 1)

    Args:
      scores: float[B, K], for K >= 2 responses to each of B prompts.
      mask: bool[B, K], True on responses with a score, the only ones that count; None: all.
      scale: "group" or True: the deviation is that of the scores of the prompt. "batch": that of
        all scores of the batch. "none" or False: no division. Dr. GRPO does not divide, because
        "group" gives more weight to prompts whose responses nearly all succeed or nearly all fail.
      eps: added to the deviation, in units of the scores.

    Returns:
      f32[B, K], zero off the mask and for the only response of a group; each group sums to 0. Equal
      scores give exactly 0, with finite gradients.

    Raises:
      ValueError: if the shape or dtype of the arguments is wrong, the scale is unknown, or K is 1.

    Shao et al., DeepSeekMath, section 4.1.2 (arXiv:2402.03300), which does not say whether the
    deviation is unbiased; this one is TRL's. Without scale: Liu et al., Understanding R1-Zero-Like
    Training, section 3.2 (arXiv:2503.20783). By the batch: Liu et al., Tricks or Traps? A Deep Dive
    into RL for LLM Reasoning (arXiv:2508.08221).

    >>> scores = jnp.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    >>> print(group_advantages(scores, eps=0.0))
    [[ 1.5 -0.5 -0.5 -0.5]
     [ 0.   0.   0.   0. ]]
    """
    scale = {True: "group", False: "none"}.get(scale, scale)
    expect_one_of(scale=(scale, SCALES))
    expect_scalars(eps=eps)
    mask = _mask_of_scores(scores, "BK", mask)
    centred = _centred(scores, mask, 1)
    if scale == "none":
        return centred
    if scale == "group":
        return _over_deviation(centred, _variance(centred, mask, 1), eps)
    return _over_deviation(centred, _variance(_centred(scores, mask, None), mask, None), eps)


def decoupled_advantages(scores, reward_weights, mask=None, *, eps=1e-4):
    """Advantages from several scores of each response, normalized apart (GDPO).

        Z_kr = (score_kr - mean_r) / (deviation_r + eps)     over the responses to a prompt
        S_k  = sum_r weight_r * Z_kr
        A_k  = (S_k - mean) / (deviation + eps)              over the batch

    Different combinations of scores with the same sum keep different advantages, and no score
    outweighs another by its scale. TRL's `multi_objective_aggregation="normalize_then_sum"`.

    Args:
      scores: float[B, K, R], R scores of each of K >= 2 responses to each of B prompts.
      reward_weights: float[R], one per score.
      mask: bool[B, K, R], True where a response has that score; None: everywhere. Other scores
        count in no mean or deviation, and their Z is 0.
      eps: added to the deviations, which are unbiased.

    Returns:
      f32[B, K], zero for a response without a score; the real ones have mean 0. Equal scores give
      exactly 0, with finite gradients.

    Raises:
      ValueError: if the shape or dtype of the arguments is wrong, or K is 1.

    Liu et al., GDPO (arXiv:2601.05242).

    >>> scores = jnp.array([[[1.0, 90.0], [0.0, 10.0]], [[1.0, 50.0], [0.0, 50.0]]])
    >>> for better, worse in decoupled_advantages(scores, jnp.array([1.0, 1.0])):
    ...     print(f"{better:.2f} {worse:.2f}")
    1.10 -1.10
    0.55 -0.55
    """
    expect(scores=(scores, "BKR", float), reward_weights=(reward_weights, "R", float))
    mask = _mask_of_scores(scores, "BKR", mask)
    centred = _centred(scores, mask, 1)
    normalized = _over_deviation(centred, _variance(centred, mask, 1), eps)
    summed = jnp.sum(normalized * reward_weights.astype(jnp.float32), axis=2)
    return normalize_advantages(summed, jnp.any(mask, axis=2), eps=eps)


def normalize_advantages(advantages, mask, *, eps=1e-4):
    """Advantages normalized to mean 0 and standard deviation 1 over the batch (REINFORCE++).

        (A - mean) / (deviation + eps)

    over all real entries. REINFORCE++ has one response to a prompt, or several, and gives it
    scores, or `rewards_to_go` with a KL penalty; REINFORCE++-baseline gives it
    `group_advantages(scores, scale="none")`. RLOO's may be normalized in the same way, as by TRL's
    `normalize_advantages`.

    Args:
      advantages: float[...]: [B, T] of tokens, [B, K] or [B] of responses.
      mask: bool[...], the same shape: True on real tokens, or on responses that count.
      eps: added to the deviation, which is unbiased.

    Returns:
      f32[...], zero off the mask. Equal advantages give exactly 0, with finite gradients.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Hu et al., REINFORCE++ (arXiv:2501.03262).

    >>> advantages, mask = jnp.array([1.0, 2.0, 3.0, jnp.nan]), jnp.arange(4) < 3
    >>> print(normalize_advantages(advantages, mask, eps=0.0))
    [-1.  0.  1.  0.]
    """
    expect(advantages=(advantages, "...", float), mask=(mask, "...", bool))
    expect_scalars(eps=eps)
    centred = _centred(advantages, mask, None)
    return _over_deviation(centred, _variance(centred, mask, None), eps)


def overlong_penalty(lengths, *, max_length, buffer):
    """Penalty on long responses, which grows linearly over the last tokens before a limit (DAPO).

        0                                          length <= max_length - buffer
        (max_length - buffer - length) / buffer    up to max_length
        -1                                         beyond it

    To be added to the scores. A response that was cut off at max_length is penalized by -1.

    Args:
      lengths: int[...], real tokens of responses.
      max_length: the length at which the penalty is full, in tokens.
      buffer: tokens over which the penalty grows; with 0 it is full beyond max_length, and nothing
        before.

    Returns:
      f32[...], from -1 to 0.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Yu et al., DAPO, eq. 13 (arXiv:2503.14476).

    >>> print(overlong_penalty(jnp.array([5, 8, 9, 12, 13]), max_length=12, buffer=4))
    [ 0.    0.   -0.25 -1.   -1.  ]
    """
    expect(lengths=(lengths, "...", int))
    expect_scalars(max_length=max_length, buffer=buffer)
    excess = jnp.asarray(max_length - buffer, jnp.float32) - lengths.astype(jnp.float32)
    return jnp.clip(excess / jnp.maximum(buffer, 1), -1.0, 0.0)


def pass_at_k(successes, samples, k):
    """Probability that at least one of k responses succeeds, from a larger number of them.

        1 - C(samples - successes, k) / C(samples, k)

    the unbiased estimate for each prompt; its mean over prompts is pass@k.

    Args:
      successes: int[B], successful responses of each prompt.
      samples: number of responses to each prompt.
      k: from 1 to samples.

    Returns:
      f32[B], from 0 to 1.

    Raises:
      ValueError: if the shape or dtype of the successes is wrong, or k is not in its range.

    Chen et al., Evaluating Large Language Models Trained on Code, eq. 1 (arXiv:2107.03374).

    >>> print(pass_at_k(jnp.array([0, 1, 4]), 4, 2))
    [0.  0.5 1. ]
    """
    expect(successes=(successes, "B", int))
    expect_positive(samples=samples, k=k)
    if k > samples:
        raise ValueError(f"k must be at most the number of samples, {samples}, but is {k}.")
    drawn = jnp.arange(k)
    failures = jnp.maximum(samples - successes[:, None] - drawn, 0)
    all_fail = jnp.prod(failures.astype(jnp.float32) / (samples - drawn), axis=1)
    return jnp.where(successes == 0, 0.0, 1.0 - all_fail)  # where the product is rounded


def _mask_of_scores(scores, axes, mask):
    """The mask, or one that is True everywhere, after a check of shapes and dtypes."""
    if mask is None:
        expect(scores=(scores, axes, float))
        mask = jnp.ones(scores.shape, bool)
    expect(scores=(scores, axes, float), mask=(mask, axes, bool))
    if scores.shape[1] < 2:
        shape = f"{scores.dtype}{list(scores.shape)}"
        expected = ", ".join(axes)
        raise ValueError(f"scores must be float[{expected}] with K >= 2, but is {shape}.")
    return mask


def _centred(x, mask, axis):
    """x minus its mean over the real entries along an axis, in float32 and zero off the mask."""
    (x,) = zero_off_mask(mask, x)
    # The mean of large equal scores may round to another number, and the division by a deviation of
    # almost 0 would amplify the difference. With the minimum subtracted first, they are zeros.
    lowest = jnp.min(x, axis, keepdims=True, where=mask, initial=jnp.inf)
    x = jnp.where(mask, x - jax.lax.stop_gradient(lowest), 0.0)
    count = count_or_one(jnp.sum(mask, axis, keepdims=True))
    for _ in range(2):  # the first mean is rounded; the second is that of the rest
        x = jnp.where(mask, x - jnp.sum(x, axis, keepdims=True) / count, 0.0)
    return x


def _variance(centred, mask, axis):
    """The unbiased variance, 0 of a single entry."""
    degrees = jnp.maximum(jnp.sum(mask, axis, keepdims=True) - 1, 1)
    return jnp.sum(jnp.square(centred), axis, keepdims=True) / degrees.astype(jnp.float32)


def _over_deviation(centred, variance, eps):
    # The root has no finite gradient at 0, and eps may be 0.
    deviation = jnp.sqrt(jnp.where(variance == 0.0, 1.0, variance))
    return centred / jnp.where(variance == 0.0, 1.0, deviation + eps)
