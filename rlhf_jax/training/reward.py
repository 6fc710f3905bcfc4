"""The reward model: a scalar head on a language model, trained on pairs of responses."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.batches import PairBatch
from rlhf_jax.errors import InputError
from rlhf_jax.functional import pairwise_loss
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import end_scores
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
    """The section `reward` of a configuration.

    Attributes:
      batch_size: pairs a step.
      num_epochs: passes over the data; may be a fraction.
      center_coef: weight of the squared sum of both scores, which keeps them near 0.
      eval_batch_size: pairs a step of the evaluation.
    """

    batch_size: int = 32
    num_epochs: float = 1.0
    center_coef: float = 0.0
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_epochs", "eval_batch_size"):
            if getattr(self, name) <= 0:
                raise InputError(f"reward.{name} must be above 0, but is {getattr(self, name)}.")
        if self.center_coef < 0:
            raise InputError(f"reward.center_coef must not be negative, but is {self.center_coef}.")


def init_params(model: Model, params: Params, key: jax.Array) -> Params:
    """{"model": params, "head": a fresh reward head}."""
    return {"model": params, "head": init_reward_head(key, model.config.n_embd)}


def init_state(
    model: Model,
    params: Params,
    settings: Settings,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """The state before the first step, from a language model's parameters.

    Args:
      params: a language model's parameters, which get a fresh head, or
        {"model": ..., "head": ...} of a reward model to be trained further.
    """
    del settings
    if set(params) != {"model", "head"}:
        params = init_params(model, params, key)
    return init_train_state(params, optimizer or make_optimizer(OptimizerSettings()))


def make_step(
    model: Model, settings: Settings, *, optimizer: optax.GradientTransformation | None = None
) -> Callable[[TrainState, PairBatch, jax.Array], tuple[TrainState, Metrics]]:
    """A pure step (state, batch, key) -> (state, metrics) on last-token pairwise scores.

    The metrics are `train/loss`, `train/accuracy` (share of pairs whose chosen response scores
    higher), `train/margin` (mean difference), `train/grad_norm` and `perf/tokens`, f32[] each.
    There is no dropout, and the key is not used.

    >>> from rlhf_jax.models.gpt2 import GPT2, GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    >>> key, settings = jax.random.key(0), Settings()
    >>> state = init_state(model, model.init(key), settings, key)
    >>> step = jax.jit(make_step(model, settings), donate_argnums=0)
    >>> tokens, real = jnp.arange(8).reshape(2, 4), jnp.ones((2, 4), bool)
    >>> pairs = (tokens, real, tokens, real, tokens[::-1], real)
    >>> state, metrics = step(state, PairBatch(*pairs, jnp.zeros(2), jnp.ones(2, bool)), key)
    >>> int(state.step), float(metrics["perf/tokens"])
    (1, 24.0)
    """
    optimizer = optimizer or make_optimizer(OptimizerSettings())

    def loss_fn(params, batch):
        return _loss(model, params, batch, settings.center_coef)

    def step(state, batch, key):
        del key
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch)
        params, opt_state, norm = apply_gradients(optimizer, state.params, state.opt_state, grads)
        masks = (batch.prompt_mask, batch.chosen_mask, batch.rejected_mask)
        metrics = {f"train/{name}": value for name, value in metrics.items()}
        metrics["train/grad_norm"] = norm
        metrics["perf/tokens"] = sum(jnp.sum(mask, dtype=jnp.float32) for mask in masks)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def make_eval_step(model: Model) -> Callable[[Params, PairBatch], Metrics]:
    """A pure (params, batch) -> {"loss", "accuracy", "margin", "count"}: sums over pairs."""

    def evaluate(params, batch):
        _, metrics = _loss(model, params, batch, 0.0, denominator=1.0)
        return {**metrics, "count": jnp.sum(batch.rows, dtype=jnp.float32)}

    return evaluate


def _loss(model, params, batch, center_coef, denominator=None):
    responses = jnp.stack([batch.chosen, batch.rejected], axis=1)
    masks = jnp.stack([batch.chosen_mask, batch.rejected_mask], axis=1)
    scores = end_scores(model, params, batch.prompts, batch.prompt_mask, responses, masks)
    loss, metrics = pairwise_loss(
        scores[:, 0],
        scores[:, 1],
        margin=batch.margin,
        center_coef=center_coef,
        mask=batch.rows,
        denominator=denominator,
    )
    return loss, {"loss": loss, "accuracy": metrics["accuracy"], "margin": metrics["margin"]}
