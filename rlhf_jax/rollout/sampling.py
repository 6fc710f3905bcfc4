"""From logits to a token: temperature, top-k, top-p, and one uniform number for each response."""

import jax
import jax.numpy as jnp

BLOCK = 256


def filtered_logprobs(
    logits: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Log-probabilities of the distribution that is sampled from.

    The logits are divided by the temperature; then all but the `top_k` largest are dropped (0 keeps
    all; ties with the smallest kept one stay), then all but the smallest set of largest ones whose
    probability reaches `top_p` (of ties those with the lower ids), and the rest is normalised.

    Args:
      logits: f32[B, V]; -inf is a token of probability 0.
      temperature, top_k, top_p: Python numbers, static.

    Returns:
      f32[B, V] in nats, -inf for dropped tokens.

    Holtzman et al. 2020, The Curious Case of Neural Text Degeneration (arXiv:1904.09751).

    >>> import numpy as np
    >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    >>> np.exp(filtered_logprobs(logits, top_p=0.6)).round(3).tolist()
    [[0.625, 0.375, 0.0]]
    """
    logits = logits.astype(jnp.float32) / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1.0:
        ordered, ids = jax.lax.top_k(logits, logits.shape[-1])
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The largest one is kept even where rounding, or top_p = 0, would drop all.
        kept = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)
        smallest, last = (jnp.take_along_axis(x, kept - 1, axis=-1) for x in (ordered, ids))
        # Equal logits are in order of their ids.
        is_tie_after = (logits == smallest) & (jnp.arange(logits.shape[-1]) > last)
        logits = jnp.where((logits < smallest) | is_tie_after, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


def sample_token(logprobs: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws a token by inverting the cumulative distribution in two levels.

    The token is the first whose cumulative probability exceeds the uniform number: a search among
    sums of blocks of 256 tokens, then within one block. At V = 50257 that costs a fraction of
    Gumbel noise, which needs V random numbers for each token.

    Args:
      logprobs: f32[B, V] normalised log-probabilities in nats, -inf allowed.
      uniform: f32[B] in [0, 1).

    Returns:
      i32[B]. A token of probability 0 is never drawn.
    """
    batch, vocab_size = logprobs.shape
    padding = -vocab_size % BLOCK
    probabilities = jnp.pad(jnp.exp(logprobs), ((0, 0), (0, padding)))
    blocks = probabilities.reshape(batch, -1, BLOCK)
    sums = blocks.sum(axis=-1)
    # Rounding makes the total differ from 1: the number is scaled by it.
    block, rest = _invert(sums, uniform * sums.sum(axis=-1))
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    within, _ = _invert(chosen, rest)
    return block * BLOCK + within


def _invert(masses: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(index, rest of the target) of the first mass that lifts the sum above the target.

    If rounding leaves the target at or above the total, the last index with any mass is chosen.
    """
    cumulative = jnp.cumsum(masses, axis=-1)
    # An accelerator sums in a tree, whose rounding can move the sum at an index without mass.
    above = (cumulative > target[:, None]) & (masses > 0)
    last = masses.shape[-1] - 1 - jnp.argmax(masses[:, ::-1] > 0, axis=-1)
    index = jnp.where(above.any(axis=-1), jnp.argmax(above, axis=-1), last).astype(jnp.int32)
    mass = jnp.take_along_axis(masses, index[:, None], axis=1)[:, 0]
    before = jnp.take_along_axis(cumulative, index[:, None], axis=1)[:, 0] - mass
    return index, jnp.clip(target - before, 0.0, mass)
