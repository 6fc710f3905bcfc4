"""Gradients of a batch that is run in parts, one after another, to save memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Params

Metrics = dict[str, Any]  # f32[] each


def accumulated_gradients(
    loss_fn: Callable[..., tuple[jax.Array, Metrics]],
    count: Callable[[Any], Any],
    params: Params,
    batch: Any,
    key: jax.Array | None,
    steps: int,
) -> tuple[Params, Metrics]:
    """(gradients, metrics) of a loss over a batch, of which a `steps`-th is run at a time.

        gradient = sum_i d/dparams loss_fn(params, part_i, key_i, count(batch))

    Each part is divided by what the whole batch counts, be it tokens, pairs or prompts, and so the
    parts add up to the whole however unequal they are. What is kept for the backward pass is that
    of one part; the sum of the gradients takes as much memory as the parameters.

    Args:
      loss_fn: (params, part, key, denominator) -> (loss, metrics), sums over the denominator, or
        means where that is None.
      count: what the loss of a batch is to be divided by, f32[], or several where it is made of
        several.
      params: what to differentiate by.
      batch: arrays [B, ...]; B may be another for each.
      key: of dropout, or None; each part has its own.
      steps: the number of parts. 1 runs the batch whole, by its own means.

    Raises:
      ValueError: `steps` does not divide B.
    """
    gradients = jax.grad(loss_fn, has_aux=True)
    if steps == 1:
        return gradients(params, batch, key, None)
    whole = count(batch)
    keys = None if key is None else jax.random.split(key, steps)

    def add(sums, part_and_key):
        part, part_key = part_and_key
        return jax.tree.map(jnp.add, sums, gradients(params, part, part_key, whole)), None

    parts = jax.tree.map(lambda array: _parts(array, steps), batch)
    first = jax.tree.map(lambda array: array[0], (parts, keys))
    shapes = jax.eval_shape(gradients, params, *first, whole)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, _ = jax.lax.scan(add, zeros, (parts, keys))
    return sums


def map_microbatches(function: Callable[[Any], Any], rows: Any, steps: int) -> Any:
    """function(rows), of which a `steps`-th is run at a time, one after another.

    Args:
      function: from arrays [B, ...] to arrays [B, ...], each row by itself.
      rows: arrays [B, ...].
      steps: the number of parts; 1 runs all rows at once.

    Raises:
      ValueError: `steps` does not divide B.

    >>> print(map_microbatches(lambda x: x * 10, jnp.arange(4), 2))
    [ 0 10 20 30]
    """
    if steps == 1:
        return function(rows)
    results = jax.lax.map(function, jax.tree.map(lambda array: _parts(array, steps), rows))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), results)


def check_steps(section: str, batch_size: int, steps: int, *, name: str = "batch_size") -> None:
    """Raises an InputError that names the settings unless the steps divide the batch."""
    if steps < 1:
        raise InputError(f"{section}.gradient_accumulation_steps must be above 0, but is {steps}.")
    if batch_size % steps:
        raise InputError(
            f"{section}.{name} = {batch_size} is not divisible by "
            f"{section}.gradient_accumulation_steps = {steps}; change one of them."
        )


def _parts(array: jax.Array, steps: int) -> jax.Array:
    """[steps, B / steps, ...]: part i has every `steps`-th row from row i on.

    Devices hold runs of rows, so that each finds its share of every part among its own.
    """
    if array.shape[0] % steps:
        raise ValueError(f"{array.shape[0]} rows are not divisible by {steps} accumulation steps.")
    rows = array.reshape(array.shape[0] // steps, steps, *array.shape[1:])
    return jnp.swapaxes(rows, 0, 1)
