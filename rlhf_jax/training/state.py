"""The state of an offline trainer, and the optimizer of all trainers."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel.partition import path_name
from rlhf_jax.training.epochs import Metrics, accumulated_gradients, apply_gradients
from rlhf_jax.training.settings import OptimizerSettings


class TrainState(NamedTuple):
    """The state of an offline trainer: everything that an exact continuation needs.

    Attributes:
      step: i32[], optimizer steps taken.
      params: the trained parameters, float32.
      opt_state: of the optimizer.
      frozen: the frozen parameters (`training.trainable`); None where all are trained.
      reference: the trained parameters of a reference that the loss compares with, of the shapes of
        `params`; None where the loss has none, or the batches hold its log-probabilities.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    frozen: Params | None = None
    reference: Params | None = None


def learning_rate_schedule(settings: OptimizerSettings, total_updates: int) -> optax.Schedule:
    """Learning rate by update, from 0 on: a linear warm-up, then constant or decaying to 0.

        peak * update / warmup_steps          before update `warmup_steps`, which has the peak

    as in optax and transformers; the first update of a warm-up has a rate of 0.
    """
    peak, rest = settings.learning_rate, max(total_updates - settings.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[settings.schedule]
    if not settings.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, settings.warmup_steps)
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def make_optimizer(
    settings: OptimizerSettings, total_updates: int = 1, *, models: Sequence[Model] = ()
) -> optax.GradientTransformation:
    """The optax transformation of the settings.

    Args:
      total_updates: where a decay of the learning rate ends.
      models: those whose parameters it trains. Weights decay but for those that a model names in
        `no_weight_decay`; if one has no such attribute, or without models, also but for arrays of
        one axis, that of stacked layers left out. The kernels of heads decay.
    """
    limit = settings.max_grad_norm
    clip = optax.identity() if limit is None else clip_by_global_norm(limit)
    adamw = optax.adamw(
        learning_rate_schedule(settings, total_updates),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=functools.partial(_decay_mask, models),
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


def _decay_mask(models: Sequence[Model], params: Params) -> Params:
    """True on the parameters that decay."""
    named = [getattr(model, "no_weight_decay", None) for model in models]
    patterns = "|".join(pattern for each in named if each is not None for pattern in each)
    by_axes = not models or None in named

    def decays(path, leaf):
        name = path_name(path)
        if re.search(r"(^|/)(value_)?head/kernel$", name):
            return True
        if patterns and re.search(rf"(^|/)({patterns})$", name):
            return False
        # A number after "layers" is that of a layer, whose arrays are not stacked.
        is_stacked = re.search(r"(^|/)layers/(?!\d)", name) is not None
        return not by_axes or leaf.ndim - is_stacked > 1

    return jax.tree_util.tree_map_with_path(decays, params)


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
    """(new state, metrics) of one optimizer step, with "grad_norm".

    Names of metrics become "train/...", unless they have a prefix of their own.

    Args:
      loss_fn, count, key: as in `accumulated_gradients`; the first argument of `loss_fn`, before
        the parameters, is `state.frozen`.
    """
    loss_fn = functools.partial(loss_fn, state.frozen)
    arguments = (loss_fn, count, state.params, batch, key, accumulation_steps)
    grads, metrics = accumulated_gradients(*arguments)
    params, opt_state, norm = apply_gradients(optimizer, state.params, state.opt_state, grads)
    named = {
        name if "/" in name else f"train/{name}": x
        for name, x in {**metrics, "grad_norm": norm}.items()
    }
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), named
