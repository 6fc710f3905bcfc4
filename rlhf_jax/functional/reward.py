"""Losses that train a reward model on comparisons."""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.expect import expect
from rlhf_jax.functional.masking import batch_mean, zero_off_mask


def pairwise_loss(chosen, rejected, *, margin=0.0, center_coef=0.0, mask=None, denominator=None):
    """Negative log-likelihood of the preferences under the Bradley-Terry model, a mean over pairs.

        -log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2

    Args:
      chosen: float[B], scores of the responses that were preferred.
      rejected: float[B], scores of the others.
      margin: by how much the chosen one should win, a number or float[B].
      center_coef: weight of the term that pulls the scores of a pair towards opposite numbers.
      mask: bool[B], False on rows that only fill up a batch; all rows are real when None.
      denominator: what to divide sums by, instead of the number of real pairs.

    Returns:
      (loss, metrics), f32[] each; metrics `accuracy`, the share of pairs in which the chosen one
      scores higher (a tie is none), and `margin`, the mean of chosen - rejected. All are 0 if no
      pair is real.

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
