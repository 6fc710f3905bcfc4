"""Gradients and results of a batch that is split into microbatches, to save memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.interface import Params

Metrics = dict[str, jax.Array]  # f32[] each


def accumulated_gradients(
    loss_fn: Callable[..., tuple[jax.Array, Metrics]],
    count: Callable[[Any], Any],
    params: Params,
    batch: Any,
    key: jax.Array | None,
    steps: int,
) -> tuple[Params, Metrics]:
    """(gradients, metrics) of a loss over a batch, computed in `steps` microbatches.

        gradient = sum_i d/dparams loss_fn(params, part_i, key_i, count(batch))

    Each microbatch is divided by the count of the full batch (of tokens, pairs or prompts), so that
    their sum is exactly the gradient of the full batch. Activations of one microbatch are kept at a
    time; the sum of the gradients takes as much memory as the parameters.

    Args:
      loss_fn: (params, microbatch, key, denominator) -> (loss, metrics), sums over the
        denominator, or means where that is None. Metrics whose names end in "/min" or "/max" are
        extremes, and combined as such.
      count: batch -> the denominator of its loss, f32[], or a pytree of several.
      params: the loss is differentiated by them.
      batch: arrays [B, ...]; B may differ between arrays.
      key: of dropout, or None; each microbatch has its own.
      steps: the number of microbatches; with 1 the denominator is None.

    Raises:
      ValueError: `steps` does not divide B.
    """
    gradients = jax.grad(loss_fn, has_aux=True)
    if steps == 1:
        return gradients(params, batch, key, None)
    denominator = count(batch)
    keys = None if key is None else jax.random.split(key, steps)

    def add(sums, part_and_key):
        part, part_key = part_and_key
        grads, metrics = gradients(params, part, part_key, denominator)
        return (jax.tree.map(jnp.add, sums[0], grads), _combined(sums[1], metrics)), None

    parts = jax.tree.map(lambda array: _parts(array, steps), batch)
    first = jax.tree.map(lambda array: array[0], (parts, keys))
    grads, metrics = jax.eval_shape(gradients, params, *first, denominator)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), grads)
    sums, _ = jax.lax.scan(add, (zeros, _no_metrics(metrics)), (parts, keys))
    return sums


_EXTREMES = {"/min": (jnp.minimum, jnp.inf), "/max": (jnp.maximum, -jnp.inf)}


def _combined(sums, metrics):
    """The metrics of one more microbatch added to those before."""
    return {
        name: jax.tree.map(_EXTREMES.get(name[-4:], (jnp.add, 0.0))[0], sums[name], each)
        for name, each in metrics.items()
    }


def _no_metrics(shapes):
    """The metrics of no microbatch."""

    def start(value, tree):
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), tree)

    return {
        name: start(_EXTREMES.get(name[-4:], (jnp.add, 0.0))[1], each)
        for name, each in shapes.items()
    }


def map_microbatches(function: Callable[[Any], Any], batch: Any, steps: int) -> Any:
    """function(batch), computed in `steps` microbatches, one after another.

    Args:
      function: from arrays [B, ...] to arrays [B, ...], independently for each example.
      batch: arrays [B, ...].
      steps: the number of microbatches.

    Raises:
      ValueError: `steps` does not divide B.

    >>> print(map_microbatches(lambda x: x * 10, jnp.arange(4), 2))
    [ 0 10 20 30]
    """
    if steps == 1:
        return function(batch)
    results = jax.lax.map(function, jax.tree.map(lambda array: _parts(array, steps), batch))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), results)


def _parts(array: jax.Array, steps: int) -> jax.Array:
    """[steps, B / steps, ...]: microbatch i has every `steps`-th example from example i on.

    Devices hold contiguous examples, so that each has its share of every microbatch already.
    """
    if array.shape[0] % steps:
        raise ValueError(
            f"{array.shape[0]} examples are not divisible by {steps} accumulation steps."
        )
    strided = array.reshape(array.shape[0] // steps, steps, *array.shape[1:])
    return jnp.swapaxes(strided, 0, 1)
