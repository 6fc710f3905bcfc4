"""Log-probabilities of tokens, and entropies of their distributions."""

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.functional.expect import expect
from rlhf_jax.functional.normalizer import MIN_LOGPROB, entropy_of, normalizer


def token_logprobs(logits, tokens):
    """Log-probability of each token under the softmax of its logits.

        logits[token] - log sum_v exp(logits[v])

    Args:
      logits: float[..., V]. A logit of -inf has probability 0, and gradients are finite. If one is
        NaN or inf, or all are -inf, the log-probability is NaN and the gradient 0, so that a mask
        can exclude such padding later.
      tokens: int[...]; a token below 0, or V and above, gives NaN.

    Returns:
      f32[...] in nats.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(token_logprobs(jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([1])))
    [-0.6931472]
    """
    expect(logits=(logits, "...V", float), tokens=(tokens, "...", int))
    tokens = tokens.astype(jnp.int32)
    logprobs = _chosen_logprobs(logits.astype(jnp.float32), tokens)
    is_known = (tokens >= 0) & (tokens < logits.shape[-1])
    return jnp.where(is_known, logprobs, jnp.nan)


@jax.custom_jvp
def _chosen_logprobs(logits, tokens):
    """f32[...] of f32[..., V] logits; NaN where they do not define a distribution."""
    top, log_total = normalizer(logits)
    return chosen_logits(logits, tokens) - top - log_total


@_chosen_logprobs.defjvp
def _chosen_logprobs_jvp(primals, tangents):
    """d logp = d logit_token - sum_v p_v d logit_v, with one exponential per logit."""
    logits, tokens = primals
    top, log_total = normalizer(logits)
    # Two differences: the sum of top and log_total would round log_total off beside large logits.
    probabilities = jnp.exp((logits - top[..., None]) - log_total[..., None])
    slope = (token_ids(logits) == tokens[..., None]) - probabilities
    slope = jnp.where(jnp.isfinite(log_total)[..., None], slope, 0.0)
    return chosen_logits(logits, tokens) - top - log_total, jnp.sum(slope * tangents[0], axis=-1)


def chosen_logits(logits, tokens):
    """f32[...]: the logit of each token."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take_along_axis(logits, tokens[..., None], axis=-1, mode="clip")[..., 0]
    # A gather would all-gather a vocabulary that is sharded over devices.
    return jnp.sum(jnp.where(token_ids(logits) == tokens[..., None], logits, 0.0), axis=-1)


def token_entropy(logits):
    """Entropy of the softmax of the logits.

        H = log sum_v exp(logits[v]) - sum_v p[v] logits[v]

    Args:
      logits: float[..., V]. A logit of -inf has probability 0, and gradients are finite. If one is
        NaN or inf, or all are -inf, the entropy is NaN and the gradient 0.

    Returns:
      f32[...] in nats, from 0 to log V.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(token_entropy(jnp.array([[0.0, 0.0, -jnp.inf]])))
    [0.6931472]
    """
    expect(logits=(logits, "...V", float))
    return _entropy(logits.astype(jnp.float32))


@jax.custom_jvp
def _entropy(logits):
    return entropy_of(logits)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    """dH = -sum_v p_v (log p_v + H) d logit_v."""
    (logits,) = primals
    entropy, (top, log_total) = entropy_of(logits), normalizer(logits)
    logp = (logits - top[..., None]) - log_total[..., None]
    # 0 * -inf is NaN.
    slope = -jnp.exp(logp) * (jnp.maximum(logp, MIN_LOGPROB) + entropy[..., None])
    slope = jnp.where(jnp.isfinite(log_total)[..., None], slope, 0.0)
    return entropy, jnp.sum(slope * tangents[0], axis=-1)


def shift_logits(logits):
    """(shifted, is_distribution): logits in float32 minus their maximum, for precision.

    0 where the maximum is not finite, since a gradient of 0 times NaN is NaN.
    """
    logits = logits.astype(jnp.float32)
    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    is_distribution = jnp.isfinite(top)
    return jnp.where(is_distribution, logits - top, 0.0), is_distribution[..., 0]


def token_ids(logits):
    """i32[..., V]: the token of each logit."""
    return lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
