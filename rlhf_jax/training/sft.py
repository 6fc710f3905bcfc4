"""Supervised fine-tuning: the next token of texts, or of completions alone."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.batches import TextBatch
from rlhf_jax.errors import InputError
from rlhf_jax.functional import cross_entropy_loss
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.training.accumulate import accumulated_gradients, check_steps
from rlhf_jax.training.state import (
    OptimizerSettings,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
)

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `sft` of a configuration.

    Attributes:
      batch_size: rows a step; a packed row holds several texts.
      gradient_accumulation_steps: parts that a batch is run in, one after another, to save memory;
        the step is that of the whole batch, but each part has dropout of its own.
      num_epochs: passes over the data; may be a fraction.
      dropout: trains with the dropout rates of the model's configuration.
      label_smoothing, z_loss: of `functional.cross_entropy_loss`.
      eval_batch_size: rows a step of the evaluation.
      rouge_rows: held-out rows, the first ones, whose ROUGE each evaluation computes: of the
        likeliest next tokens, each after the true ones, against the completion.
    """

    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    num_epochs: float = 1.0
    dropout: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    eval_batch_size: int = 16
    rouge_rows: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_epochs", "eval_batch_size"):
            if getattr(self, name) <= 0:
                raise InputError(f"sft.{name} must be above 0, but is {getattr(self, name)}.")
        check_steps("sft", self.batch_size, self.gradient_accumulation_steps)
        if self.rouge_rows < 0:
            raise InputError(f"sft.rouge_rows must be at least 0, but is {self.rouge_rows}.")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                "sft.label_smoothing must be at least 0 and below 1, but is "
                f"{self.label_smoothing}."
            )


def init_state(
    model: Model,
    params: Params,
    settings: Settings,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """The state before the first step; nothing in it is random (`key` is there for symmetry)."""
    del model, settings, key
    return init_train_state(params, optimizer or make_optimizer(OptimizerSettings()))


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
    optimizer = optimizer or make_optimizer(OptimizerSettings())

    def loss_fn(params, batch, key, denominator):
        return _loss(model, params, batch, settings, key, denominator)

    def step(state, batch, key):
        dropout_key, parts = key if settings.dropout else None, settings.gradient_accumulation_steps
        grads, metrics = accumulated_gradients(
            loss_fn, _count, state.params, batch, dropout_key, parts
        )
        params, opt_state, norm = apply_gradients(optimizer, state.params, state.opt_state, grads)
        metrics = {
            "train/loss": metrics["loss"],
            "train/accuracy": metrics["accuracy"],
            "train/grad_norm": norm,
            "perf/tokens": jnp.sum(batch.segments > 0, dtype=jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def make_eval_step(model: Model) -> Callable[[Params, TextBatch], Metrics]:
    """A pure (params, batch) -> {"loss", "accuracy", "count"}: sums over tokens, and their number.

    Sums of several batches, divided by the summed count, are exact whatever the batch size.
    """

    def evaluate(params, batch):
        _, metrics = _loss(model, params, batch, Settings(), None, denominator=1.0)
        return {"loss": metrics["nll"], "accuracy": metrics["accuracy"], "count": _count(batch)}

    return evaluate


def _count(batch):
    """f32[]: the tokens that the loss is a mean over."""
    return jnp.sum(batch.loss_mask[:, 1:], dtype=jnp.float32)


def _loss(model, params, batch, settings, dropout_key, denominator=None):
    hidden = model.hidden(params, batch.tokens, batch.segments, dropout_key=dropout_key)
    states, targets, mask = predictions(batch, hidden)
    loss, metrics = cross_entropy_loss(
        model.padded_logits(params, states),
        targets,
        mask,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        denominator=denominator,
    )
    return loss, {**metrics, "loss": loss}


def predictions(batch: TextBatch, hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(states [B, K, D], the tokens that they are to predict i32[B, K], which count bool[B, K]).

    Those of `batch.target_positions`, and without it all: K is then L - 1.
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
