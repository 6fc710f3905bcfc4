"""Epochs of minibatch updates on the responses of one iteration, and gradients by microbatches."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.models.interface import Params

Metrics = dict[str, jax.Array]  # f32[] each

# Metric over the updates of an iteration -> (metric of an update, function).
_OVER_UPDATES: dict[str, tuple[str, Callable[..., jax.Array]]] = {
    "val/ratio_var": ("val/ratio", jnp.var),
    "clip_ratio/low_min": ("clip_ratio/low_mean", jnp.min),
    "clip_ratio/high_max": ("clip_ratio/high_mean", jnp.max),
}


def run_epochs(
    loss: Callable[..., tuple[jax.Array, Metrics]],
    count: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: Any,
    experience: Any,
    key: jax.Array,
    *,
    num_epochs: int = 1,
    num_minibatches: int = 1,
    accumulation_steps: int = 1,
    texts: Any = None,
    max_approxkl: float | None = None,
) -> tuple[Params, Any, Metrics]:
    """(params, opt_state, metrics) after `num_epochs` passes over the experience.

    Each epoch has its own permutation of the B responses, split into minibatches.

    Args:
      loss: (params, (minibatch, texts), key, denominator) -> (loss, metrics): means, or sums over
        the denominator, which is None or `count` of a full minibatch. The key is None.
      count: (minibatch, texts) -> the denominator of the loss, such as the number of tokens.
      experience: arrays [B, ...].
      texts: arrays [num_epochs * num_minibatches, ...]: a second batch for each update, or None.
      max_approxkl: ends the epochs before the first update whose minibatch has a larger metric
        "policy/approxkl_avg".

    Returns:
      The metrics are means over the updates, and extremes where their names end in "/min" or
      "/max". Further ones are "train/grad_norm" and, where the loss has the metric on the right,

          val/ratio_var          variance over updates of "val/ratio"
          clip_ratio/low_min     minimum of "clip_ratio/low_mean"
          clip_ratio/high_max    maximum of "clip_ratio/high_mean"

      With `max_approxkl` means are over the minibatches until the last update and the one after it,
      and "policy/updates" is the share of updates taken.
    """
    batch = jax.tree.leaves(experience)[0].shape[0]
    parts = (minibatch_indices(key, num_epochs, num_minibatches, batch), texts)
    update = functools.partial(_update, loss, count, accumulation_steps, optimizer, experience)
    if max_approxkl is not None:
        return _update_until(update, max_approxkl, (params, opt_state), parts)
    (params, opt_state), metrics = jax.lax.scan(update, (params, opt_state), parts)
    spread = {name: of(metrics[key]) for name, (key, of) in _OVER_UPDATES.items() if key in metrics}
    means = {"/min": jnp.min, "/max": jnp.max}
    metrics = {name: means.get(name[-4:], jnp.mean)(x) for name, x in metrics.items()}
    return params, opt_state, metrics | spread


def minibatch_indices(
    key: jax.Array, num_epochs: int, num_minibatches: int, size: int
) -> jax.Array:
    """i32[epochs * minibatches, size / minibatches]: a permutation of `size` for each epoch."""
    keys = jax.random.split(key, num_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(keys)
    return order.reshape(num_epochs * num_minibatches, size // num_minibatches)


def _update_until(update, max_approxkl, carry, parts):
    """Updates until the first minibatch above max_approxkl, which is not applied."""

    def apply(carry, part):
        updated, metrics = update(carry, part)
        is_near = metrics["policy/approxkl_avg"] <= max_approxkl
        carry = jax.tree.map(lambda new, old: jnp.where(is_near, new, old), updated, carry)
        return carry, is_near, metrics

    def skip(carry, part):
        metrics = jax.eval_shape(apply, carry, part)[2]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
        return carry, jnp.zeros((), bool), zeros

    def step(carry, part):
        carry, is_on = carry
        carry, is_applied, metrics = jax.lax.cond(is_on, apply, skip, carry, part)
        return (carry, is_applied), (metrics, is_on, is_applied)

    start = (carry, jnp.ones((), bool))
    ((params, opt_state), _), (metrics, measured, applied) = jax.lax.scan(step, start, parts)
    spread = {"policy/updates": jnp.mean(applied, dtype=jnp.float32)}
    if "val/ratio" in metrics:
        ratio_var = functional.masked_var(metrics["val/ratio"], measured, unbiased=False)
        spread = {"val/ratio_var": ratio_var, **spread}
    metrics = {name: functional.masked_mean(x, measured) for name, x in metrics.items()}
    return params, opt_state, metrics | spread


def _update(loss, count, steps, optimizer, experience, carry, part):
    """((params, opt_state), metrics) of one update on the responses at some indices, and texts."""
    (params, opt_state), (indices, texts) = carry, part
    minibatch = jax.tree.map(lambda x: x[indices], experience)
    grads, metrics = accumulated_gradients(loss, count, params, (minibatch, texts), None, steps)
    params, opt_state, norm = apply_gradients(optimizer, params, opt_state, grads)
    return (params, opt_state), {**metrics, "train/grad_norm": norm}


def apply_gradients(
    optimizer: optax.GradientTransformation, params: Params, opt_state: Any, grads: Params
) -> tuple[Params, Any, jax.Array]:
    """(new parameters, new optimizer state, f32[] global norm of the gradients before clipping)."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)


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
