"""Dropout with half the random numbers that JAX's own would draw."""

import jax
import jax.numpy as jnp

_STEPS = 2**16


def dropout_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> tuple[jax.Array, float]:
    """(bool[shape], what to multiply with where it is True).

    An entry is False with probability `rate`, to the nearest 1/65536; the factor is the inverse of
    what is left, so that expectations are kept exactly. Each random word of 32 bits serves two
    entries.

    Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting.
    """
    dropped = min(round(rate * _STEPS), _STEPS - 1)
    *rows, length = shape
    words = jax.random.bits(key, (*rows, -(-length // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    halves = halves.reshape(*rows, -1)[..., :length]
    return halves >= dropped, _STEPS / (_STEPS - dropped)
