"""Log-probabilities of tokens and entropies of the distributions that they come from."""

import jax.numpy as jnp
from jax import lax

from rlhf_jax.functional.expect import expect


def token_logprobs(logits, tokens):
    """Log-probability of each token under the softmax of its logits.

        logits[token] - log sum_v exp(logits[v])

    Args:
      logits: float[..., V]. A logit of -inf has probability 0, and gradients stay finite.
      tokens: int[...]; one below 0, or V and above, yields NaN.

    Returns:
      f32[...] in nats.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(token_logprobs(jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([1])))
    [-0.6931472]
    """
    expect(logits=(logits, "...V", float), tokens=(tokens, "...", int))
    shifted = _shifted(logits)
    # A comparison and not a gather: as fast, and it lets the vocabulary stay split over devices.
    is_token = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == tokens[..., None]
    chosen = jnp.sum(jnp.where(is_token, shifted, 0.0), axis=-1)
    chosen = jnp.where((tokens >= 0) & (tokens < logits.shape[-1]), chosen, jnp.nan)
    return chosen - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def token_entropy(logits):
    """Entropy of the softmax of the logits.

        H = log sum_v exp(logits[v]) - sum_v p[v] logits[v]

    Args:
      logits: float[..., V]. A logit of -inf has probability 0, and gradients stay finite.

    Returns:
      f32[...] in nats, from 0 to log V.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(token_entropy(jnp.array([[0.0, 0.0, -jnp.inf]])))
    [0.6931472]
    """
    expect(logits=(logits, "...V", float))
    shifted = _shifted(logits)
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    # 0 * -inf is NaN, in the product and in its gradient.
    finite = jnp.where(jnp.isneginf(shifted), 0.0, shifted)
    return jnp.log(total) - jnp.sum(weights * finite, axis=-1) / total


def _shifted(logits):
    """The logits in float32 less their maximum, so that large ones keep their last digits."""
    logits = logits.astype(jnp.float32)
    return logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
