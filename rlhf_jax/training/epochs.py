"""Epochs of minibatch updates on the responses of one iteration, as one scan."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.models.interface import Params
from rlhf_jax.training.accumulate import Metrics, accumulated_gradients
from rlhf_jax.training.state import apply_gradients

# Metrics over the updates of an iteration, and what they are of.
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
      "/max", with "train/grad_norm" among them. To them come, where the loss has what they are of,
      "val/ratio_var", the variance of "val/ratio" over updates, "clip_ratio/low_min", the minimum
      of "clip_ratio/low_mean", and "clip_ratio/high_max", the maximum of "clip_ratio/high_mean".
      With
      `max_approxkl` they are means over the minibatches until the last update and the one after
      it, and "policy/updates" is the share of updates taken.
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
