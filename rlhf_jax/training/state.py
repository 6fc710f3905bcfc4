"""The state of an offline trainer, and the optimizer of all trainers."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.models.interface import Params
from rlhf_jax.training.accumulate import Metrics, accumulated_gradients
from rlhf_jax.training.settings import OptimizerSettings


class TrainState(NamedTuple):
    """The state of an offline trainer: everything that an exact continuation needs.

    Attributes:
      step: i32[], optimizer steps taken.
      params: the trained parameters, float32.
      opt_state: of the optimizer.
      frozen: the frozen parameters (`training.trainable`); None where all are trained.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    frozen: Params | None = None


def learning_rate_schedule(settings: OptimizerSettings, total_updates: int) -> optax.Schedule:
    """Learning rate by update: a linear warm-up, then constant or decaying to 0."""
    peak, rest = settings.learning_rate, max(total_updates - settings.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[settings.schedule]
    if not settings.warmup_steps:
        return after
    # Starts at peak / warmup_steps: an update with a learning rate of 0 would be lost.
    warmup = optax.linear_schedule(
        peak / settings.warmup_steps, peak, max(settings.warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def make_optimizer(
    settings: OptimizerSettings, total_updates: int = 1
) -> optax.GradientTransformation:
    """The optax transformation of the settings; a decay ends at `total_updates`."""
    limit = settings.max_grad_norm
    clip = optax.identity() if limit is None else clip_by_global_norm(limit)
    adamw = optax.adamw(
        learning_rate_schedule(settings, total_updates),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=_decayed,
    )
    return optax.chain(clip, adamw)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Gradients times min(1, max_norm / norm), equal to optax's but for rounding.

    Optax divides each gradient by the norm; the compiler does not duplicate a division, and writes
    all scaled gradients to memory. A product is fused into its consumers.

    Pascanu et al. 2013, On the Difficulty of Training Recurrent Neural Networks, algorithm 1.
    """

    def init(params):
        del params
        return optax.EmptyState()

    def update(grads, state, params=None):
        del params
        scale = max_norm / jnp.maximum(optax.tree.norm(grads), max_norm)
        return jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads), state

    return optax.GradientTransformation(init, update)


def _decayed(params: Params) -> Params:
    """True on matrices and embeddings, by name: stacking gives biases a second axis."""

    def is_matrix(path, leaf):
        # The key's text, since a model of another family need not keep its parameters in dicts.
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return name in ("kernel", "embedding") and leaf.ndim >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def init_train_state(
    params: Params, optimizer: optax.GradientTransformation, frozen: Params | None = None
) -> TrainState:
    """The state before the first step; the optimizer has a state for `params` alone."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), frozen)


def offline_step(
    loss_fn: Callable[..., tuple[jax.Array, Metrics]],
    count: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    key: jax.Array | None,
    accumulation_steps: int,
) -> tuple[TrainState, Metrics]:
    """(new state, metrics) of one optimizer step, the metrics as "train/...", with "grad_norm".

    Args:
      loss_fn, count, key: as in `accumulated_gradients`; the first argument of `loss_fn`, before
        the parameters, is `state.frozen`.
    """
    loss_fn = functools.partial(loss_fn, state.frozen)
    arguments = (loss_fn, count, state.params, batch, key, accumulation_steps)
    grads, metrics = accumulated_gradients(*arguments)
    params, opt_state, norm = apply_gradients(optimizer, state.params, state.opt_state, grads)
    metrics = {f"train/{name}": x for name, x in {**metrics, "grad_norm": norm}.items()}
    return TrainState(state.step + 1, params, opt_state, state.frozen), metrics


def apply_gradients(
    optimizer: optax.GradientTransformation, params: Params, opt_state: Any, grads: Params
) -> tuple[Params, Any, jax.Array]:
    """(new parameters, new optimizer state, f32[] global norm of the gradients before clipping)."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)
