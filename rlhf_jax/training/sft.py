"""Supervised fine-tuning: the next token of texts, or of completions alone."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.batches import TextBatch
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.models.readout import cross_entropy_loss
from rlhf_jax.training import trainable
from rlhf_jax.training.epochs import Metrics
from rlhf_jax.training.sft_settings import TRAINER, Settings
from rlhf_jax.training.state import TrainState, init_train_state, make_optimizer, offline_step
from rlhf_jax.training.trainable import Trainable

__all__ = [
    "Settings",
    "count_targets",
    "full_params",
    "init_state",
    "make_eval_step",
    "make_step",
    "text_loss",
]


def init_state(
    model: Model,
    params: Params,
    settings: Settings,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """The state before the first step.

    The state holds `params` themselves: a step that donates it consumes them.

    Args:
      params: the model's full parameters.
      key: unused, as nothing is random; every trainer has it.

    Raises:
      InputError: `dropout` is true, and the attention of the model has none.
    """
    del key
    if settings.dropout:
        model.check_dropout()
    trained, frozen = trainable.split(model, params, None, settings.section)
    return init_train_state(trained, optimizer or make_optimizer(TRAINER.optimizer), frozen)


def full_params(model: Model, state: TrainState) -> Params:
    """The model's full parameters."""
    return trainable.full_params(model, Trainable(state.params, state.frozen))


def make_step(
    model: Model, settings: Settings, *, optimizer: optax.GradientTransformation | None = None
) -> Callable[[TrainState, TextBatch, jax.Array], tuple[TrainState, Metrics]]:
    """A pure step (state, batch, key) -> (state, metrics) of supervised fine-tuning.

    The metrics are `train/loss` (nats per token), `train/accuracy`, `train/grad_norm` and
    `perf/tokens` (real tokens of the batch), f32[] each.

    >>> from rlhf_jax.models.gpt2 import GPT2, GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    >>> key, settings = jax.random.key(0), Settings()
    >>> state = init_state(model, model.init(key), settings, key)
    >>> step = jax.jit(make_step(model, settings), donate_argnums=0)
    >>> tokens = jnp.arange(8).reshape(2, 4)
    >>> batch = TextBatch(tokens, jnp.ones_like(tokens), jnp.ones((2, 4), bool))
    >>> state, metrics = step(state, batch, key)
    >>> int(state.step), float(metrics["perf/tokens"])
    (1, 8.0)
    """
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)

    loss_fn, steps = functools.partial(_loss, model, settings), settings.gradient_accumulation_steps

    def step(state, batch, key):
        key = key if settings.dropout else None
        state, metrics = offline_step(loss_fn, count_targets, optimizer, state, batch, key, steps)
        tokens = jnp.sum(batch.segments > 0, dtype=jnp.float32)
        return state, {**metrics, "perf/tokens": tokens}

    return step


def make_eval_step(
    model: Model, settings: Settings | None = None
) -> Callable[[Params, TextBatch], Metrics]:
    """A pure (params, batch) -> {"loss", "accuracy", "count"}: sums over tokens, and their number.

    The parameters are full. Sums of several batches, divided by the summed count, are exact
    whatever the batch size. The settings are not read: the loss is the negative log-likelihood.
    """
    del settings

    def evaluate(params, batch):
        _, metrics = text_loss(model, Trainable(params), batch, denominator=1.0)
        count = count_targets(batch)
        return {"loss": metrics["nll"], "accuracy": metrics["accuracy"], "count": count}

    return evaluate


def count_targets(batch: TextBatch) -> jax.Array:
    """f32[]: the number of tokens that `text_loss` is a mean over."""
    return jnp.sum(batch.loss_mask[:, 1:], dtype=jnp.float32)


def text_loss(
    model: Model,
    params: Trainable,
    batch: TextBatch,
    *,
    settings: Settings | None = None,
    dropout_key: jax.Array | None = None,
    denominator: jax.Array | float | None = None,
) -> tuple[jax.Array, Metrics]:
    """`functional.cross_entropy_loss` of the targets of texts, at temperature 1.

    Args:
      settings: of which `label_smoothing` and `z_loss` are used; None: both are 0.
      dropout_key: None runs without dropout.
    """
    settings = settings or Settings()
    hidden = trainable.text_hidden(
        model, params, batch.tokens, batch.segments, dropout_key=dropout_key
    )
    states, targets, mask = _predictions(batch, hidden)
    return cross_entropy_loss(
        model,
        trainable.full_params(model, params),
        states,
        targets,
        mask,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        denominator=denominator,
    )


def _loss(model, settings, frozen, params, batch, dropout_key, denominator):
    loss, metrics = text_loss(
        model,
        Trainable(params, frozen),
        batch,
        settings=settings,
        dropout_key=dropout_key,
        denominator=denominator,
    )
    return loss, {"loss": loss, "accuracy": metrics["accuracy"]}


def _predictions(batch, hidden):
    """(states [B, K, D], target tokens i32[B, K], loss mask bool[B, K]).

    Those at `batch.target_positions`, and without it all: K is then L - 1.
    """
    if batch.target_positions is None:
        # A token is predicted from the state before it; the last state predicts nothing.
        return hidden[:, :-1], batch.tokens[:, 1:], batch.loss_mask[:, 1:]
    before = jnp.maximum(batch.target_positions - 1, 0)
    states = jnp.take_along_axis(hidden, before[:, :, None], axis=1)
    return (
        states,
        jnp.take_along_axis(batch.tokens, batch.target_positions, axis=1),
        batch.target_positions > 0,
    )
