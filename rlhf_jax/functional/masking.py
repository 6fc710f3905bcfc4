"""Means, variances and whitening over real positions, and the mask of a response."""

import numbers

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.functional.expect import expect, expect_scalars


def masked_mean(x, mask, axis=None):
    """Mean of the real entries.

        sum(x * mask) / sum(mask)

    Args:
      x: float[...].
      mask: bool[...], the same shape as x.
      axis: the axis or axes to reduce; None: all of them.

    Returns:
      f32, the shape of x without the reduced axes; 0 if no entry is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
    2.0
    """
    expect(x=(x, "...", float), mask=(mask, "...", bool))
    (x,) = zero_off_mask(mask, x)
    return jnp.sum(x, axis) / count_or_one(jnp.sum(mask, axis))


def masked_var(x, mask, axis=None, *, unbiased=True):
    """Variance of the real entries.

        sum((x - mean)^2 * mask) / (n - 1)        n = sum(mask); divided by n if not unbiased

    Args:
      x: float[...].
      mask: bool[...], the same shape as x.
      axis: the axis or axes to reduce; None: all of them.
      unbiased: whether to divide by n - 1 (Bessel's correction) or by n.

    Returns:
      f32, the shape of x without the reduced axes; 0 if fewer than two entries are real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(masked_var(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
    2.0
    """
    _, residuals = _centred(x, mask, axis)
    degrees = jnp.sum(mask, axis) - (1 if unbiased else 0)
    return jnp.sum(jnp.square(residuals), axis) / jnp.maximum(degrees, 1).astype(jnp.float32)


def masked_whiten(x, mask, *, shift_mean=True, unbiased=True, eps=1e-8):
    """Normalizes the real entries to variance 1, and to mean 0 if shift_mean.

        (x - mean) / sqrt(var + eps)  (+ mean, without shift_mean)

    Advantages are whitened with shift_mean, rewards without it. Statistics are over all real
    entries of x; under jit with a sharded batch, over the batch of all devices.

    Args:
      x: float[...].
      mask: bool[...], the same shape as x.
      shift_mean: whether to subtract the mean.
      unbiased: the kind of variance, as in `masked_var`. minichatgpt, TRL and trlX use the unbiased
        one, openai/lm-human-preferences does not.
      eps: added to the variance.

    Returns:
      f32[...], zero off the mask.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> x, mask = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
    >>> print(masked_whiten(x, mask, unbiased=False))
    [-1.  1.  0.]
    """
    expect_scalars(eps=eps)
    mean, residuals = _centred(x, mask, None)
    whitened = residuals * lax.rsqrt(masked_var(x, mask, unbiased=unbiased) + eps)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)


def _centred(x, mask, axis):
    """(mean, x - mean), with the reduced axes kept; the differences are 0 off the mask."""
    expect(x=(x, "...", float), mask=(mask, "...", bool))
    axes = tuple(range(x.ndim)) if axis is None else axis
    mean = jnp.expand_dims(masked_mean(x, mask, axis), axes)
    residuals = jnp.where(mask, zero_off_mask(mask, x)[0] - mean, 0.0)
    # The mean is rounded, by 5e-4 near 10,000: of equal numbers it would leave a variance of 2e-7.
    rest = jnp.expand_dims(masked_mean(residuals, mask, axis), axes)
    return mean + rest, jnp.where(mask, residuals - rest, 0.0)


def response_mask(tokens, stop_token_ids):
    """Mask of responses: True up to and including the first stop token, which is an action.

    Args:
      tokens: int[B, T].
      stop_token_ids: tuple of ints, each of which ends a response; if empty, all tokens are real.

    Returns:
      bool[B, T].

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(response_mask(jnp.array([[5, 0, 7, 0]]), (0,)))
    [[ True  True False False]]
    """
    expect(tokens=(tokens, "BT", int))
    if not (
        isinstance(stop_token_ids, tuple)
        and all(isinstance(token_id, numbers.Integral) for token_id in stop_token_ids)
    ):
        raise ValueError(
            f"stop_token_ids must be a tuple of whole numbers, but is {stop_token_ids!r}."
        )
    # In int32 for every dtype of tokens: a count in uint8 overflows at 255.
    tokens = tokens.astype(jnp.int32)
    stops = jnp.zeros_like(tokens)
    for token_id in stop_token_ids:
        stops = jnp.where(tokens == token_id, 1, stops)
    return jnp.cumsum(stops, axis=1) - stops == 0


def zero_off_mask(mask, *arrays):
    """The arrays in float32, with 0 off the mask.

    To be applied to inputs before any arithmetic: a `where` on the result would keep NaN out of the
    value, but not 0 * NaN out of the gradient.
    """
    return tuple(jnp.where(mask, x.astype(jnp.float32), 0.0) for x in arrays)


def masked_tokens(mask, **arrays):
    """float[B, T] arrays as by `zero_off_mask`, after a check of their shapes and dtypes."""
    expect(**{name: (x, "BT", float) for name, x in arrays.items()}, mask=(mask, "BT", bool))
    return zero_off_mask(mask, *arrays.values())


def is_last(mask):
    """True on the last real position of each response of bool[B, T], if it has one."""
    positions = jnp.arange(mask.shape[1])
    return mask & (
        positions == jnp.max(jnp.where(mask, positions, -1), axis=1, keepdims=True, initial=-1)
    )


def batch_mean(x, mask, denominator=None):
    """Sum over the real entries of x, divided by their number or by `denominator`, as f32[].

    The denominator is the number of real entries of a larger batch of which this one is a part, so
    that the results of the parts add up to its mean. 0 if there are no real entries.
    """
    expect_scalars(denominator=denominator)
    total = jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0))
    return total / count_or_one(jnp.sum(mask) if denominator is None else denominator)


def count_or_one(count):
    """A count as f32 divisor: 1 instead of 0, since sums over no entries are 0."""
    count = jnp.asarray(count, jnp.float32)
    return jnp.where(count == 0, 1.0, count)


def on_all_devices(x):
    """The complete batch on each device: a sharded axis is not sorted with explicit axes."""
    is_sharded = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if is_sharded else x
