"""The loss of supervised fine-tuning."""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.expect import expect, expect_scalars
from rlhf_jax.functional.logprobs import chosen_logits, token_logprobs
from rlhf_jax.functional.masking import batch_mean


def cross_entropy_loss(logits, targets, mask, *, label_smoothing=0.0, z_loss=0.0, denominator=None):
    """Cross entropy of target tokens, a mean over real tokens.

        nll_t  = log Z_t - logits_t[target],     Z_t = sum_v exp(logits_t[v])
        loss_t = (1 - label_smoothing) * nll_t + label_smoothing * mean_v(log Z_t - logits_t[v])
                 + z_loss * (log Z_t)^2

    Args:
      logits: float[B, T, V]. A logit of -inf has probability 0 and is excluded from the smoothing.
      targets: int[B, T], the token that logits[b, t] predict: aligned, without a shift.
      mask: bool[B, T], True on real targets.
      label_smoothing: share of the weight that is uniform over all tokens.
      z_loss: weight of the squared log-normalizer, which limits the drift of logits.
      denominator: divisor of the sums, instead of the number of real tokens.

    Returns:
      (loss, metrics), f32[] each; metrics `nll`, in nats per token and without the extra terms,
      and `accuracy`, the share of targets with the largest logit. All are 0 if no token is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Label smoothing: Szegedy et al., section 7 (arXiv:1512.00567). z-loss: Chowdhery et al., PaLM,
    section 5 (arXiv:2204.02311).

    >>> logits, targets = jnp.log(jnp.array([[[0.75, 0.25], [0.5, 0.5]]])), jnp.array([[0, -100]])
    >>> loss, metrics = cross_entropy_loss(logits, targets, jnp.array([[True, False]]))
    >>> print(jnp.exp(-loss), metrics["accuracy"])
    0.75 1.0
    """
    expect(logits=(logits, "BTV", float), targets=(targets, "BT", int), mask=(mask, "BT", bool))
    expect_scalars(label_smoothing=label_smoothing, z_loss=z_loss)
    logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
    targets = jnp.where(mask, targets.astype(jnp.int32), 0)
    nll = -token_logprobs(logits, targets)
    losses = nll
    # Terms with a weight of 0 are not computed: each reads all logits again.
    if not _is_zero(label_smoothing):
        # Not nll + s * (uniform - nll), which is NaN instead of inf for an impossible target.
        losses = (1.0 - label_smoothing) * nll + label_smoothing * _uniform_loss(logits)
    if not _is_zero(z_loss):
        losses += z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    correct = _is_first_largest(logits, targets)
    return batch_mean(losses, mask, denominator), {
        "nll": batch_mean(nll, mask, denominator),
        "accuracy": batch_mean(correct, mask, denominator),
    }


def _is_first_largest(logits, targets):
    """Whether argmax is the target, in a tenth of its time on a CPU; False if a logit is NaN."""
    is_known = (targets >= 0) & (targets < logits.shape[-1])
    chosen, targets = chosen_logits(logits, targets)[..., None], targets[..., None]
    is_before = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < targets
    is_less = (logits < chosen) | (~is_before & (logits == chosen))
    return jnp.all(is_less, axis=-1) & is_known


def _uniform_loss(logits):
    """The cross entropy with a uniform target over all possible tokens."""
    possible = ~jnp.isneginf(logits)
    mean_logit = jnp.sum(jnp.where(possible, logits, 0.0), axis=-1) / jnp.sum(possible, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - mean_logit


def _is_zero(number):
    return isinstance(number, int | float) and number == 0
