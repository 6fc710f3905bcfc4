"""From the log-probabilities of tokens to one number per response, beyond sums and means."""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.expect import expect, expect_scalars
from rlhf_jax.functional.masking import masked_mean, masked_tokens


def length_desensitized_logprobs(logprobs, mask, other_lengths, *, alpha):
    """Log-probabilities of responses in which the excess over the other one's length weighs less.

        sum_{t <= n} logprobs_t + alpha * sum_{t > n} logprobs_t

    where t counts real tokens from 1 and n is the length of the shorter response of the pair. They
    take the place of sums in `dpo_loss`, the reference's included.

    Args:
      logprobs: float[B, T] of the tokens of responses, in nats.
      mask: bool[B, T], True on real tokens.
      other_lengths: int[B], real tokens of the other responses of the pairs.
      alpha: weight of the excess tokens: 1 is plain DPO, 0 cuts them off (TRL's ld_alpha).

    Returns:
      f32[B], 0 for a response without a real token.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Liu et al., Length Desensitization in DPO (arXiv:2409.06411).

    >>> print(length_desensitized_logprobs(
    ...     jnp.array([[-1.0, -2.0, -4.0]]), jnp.ones((1, 3), bool), jnp.array([2]), alpha=0.5))
    [-5.]
    """
    expect(
        logprobs=(logprobs, "BT", float),
        mask=(mask, "BT", bool),
        other_lengths=(other_lengths, "B", int),
    )
    expect_scalars(alpha=alpha)
    (logprobs,) = masked_tokens(mask, logprobs=logprobs)
    is_shared = jnp.cumsum(mask, axis=1) <= other_lengths[:, None]
    return jnp.sum(jnp.where(is_shared, logprobs, alpha * logprobs), axis=1)


def token_collision_entropy(logits):
    """Rényi entropy of order 2 of the softmax of the logits, without a gradient.

        -log sum_v p[v]^2

    The expected log-probability of a sampled token is -entropy; the log of its expected probability
    is minus this, by which `wpo_weights` normalizes log-probabilities.

    Args:
      logits: float[..., V]. A logit of -inf has probability 0.

    Returns:
      f32[...] in nats, from 0 to log V; NaN if a logit is NaN or inf, or all are -inf.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(token_collision_entropy(jnp.array([[0.0, 0.0, -jnp.inf]])))
    [0.6931472]
    """
    expect(logits=(logits, "...V", float))
    logp = jax.nn.log_softmax(jax.lax.stop_gradient(logits).astype(jnp.float32), axis=-1)
    return -jax.nn.logsumexp(2.0 * logp, axis=-1)


def wpo_weights(logprobs, collision_entropy, mask):
    """Weights of responses by their probability under the policy, without a gradient.

        exp(mean_t(logprobs_t + collision_entropy_t)) = exp(mean_t(log(p_t / sum_v p_t[v]^2)))

    The weight of a pair is the product of those of its responses: `weights` of `dpo_loss`. It is
    not limited, as in TRL 0.29; earlier releases limited it to 1.

    Args:
      logprobs: float[B, T] of the tokens of responses under the policy in training, in nats.
      collision_entropy: float[B, T], `token_collision_entropy` of its distributions.
      mask: bool[B, T], True on real tokens.

    Returns:
      f32[B], at most V; 1 for a response without a real token.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Zhou et al., WPO, eq. 2 (arXiv:2406.11827).

    >>> logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    >>> weights = wpo_weights(
    ...     jnp.log(jnp.array([[0.5]])), token_collision_entropy(logits), jnp.array([[True]]))
    >>> print(f"{weights[0]:.4f}")
    1.3333
    """
    logprobs, collision_entropy = masked_tokens(
        mask, logprobs=logprobs, collision_entropy=collision_entropy
    )
    mean = masked_mean(logprobs + collision_entropy, mask, axis=1)
    return jnp.exp(jax.lax.stop_gradient(mean))
