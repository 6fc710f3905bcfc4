"""The reward model: a scalar head on a language model, trained on compared responses."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.batches import PairBatch, RankingBatch, Sequences
from rlhf_jax.functional import pairwise_loss, ranking_loss, tokenwise_pairwise_loss
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import end_scores, token_scores
from rlhf_jax.training import flops, trainable
from rlhf_jax.training.accumulate import accumulated_gradients
from rlhf_jax.training.reward_settings import TRAINER, Objective, Settings
from rlhf_jax.training.state import TrainState, apply_gradients, init_train_state, make_optimizer
from rlhf_jax.training.trainable import Trainable

__all__ = [
    "Batch",
    "Objective",
    "Settings",
    "flops_per_token",
    "full_params",
    "init_params",
    "init_state",
    "make_eval_step",
    "make_score_step",
    "make_step",
    "sequences_of",
]

Metrics = dict[str, jax.Array]
Batch = PairBatch | RankingBatch


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
      params: a language model's full parameters, to which a fresh head is added, or
        {"model": ..., "head": ...} of a reward model to be trained further.

    Raises:
      InputError: more layers are to be trained than the model has.
    """
    if set(params) != {"model", "head"}:
        params = init_params(model, params, key)
    trained, frozen = trainable.split(
        model, params["model"], settings.num_layers_unfrozen, settings.section
    )
    return init_train_state(
        {**params, "model": trained}, optimizer or make_optimizer(TRAINER.optimizer), frozen
    )


def full_params(model: Model, state: TrainState) -> Params:
    """{"model": ..., "head": ...} of a state, frozen layers included."""
    parts = Trainable(state.params["model"], state.frozen)
    return {**state.params, "model": trainable.full_params(model, parts)}


def flops_per_token(model: Model, state: TrainState, settings: Settings) -> float:
    """FLOPs of a step for each real token; shapes of the state suffice."""
    del settings
    return flops.supervised_flops(model, state.params, state.frozen, unembeds=False)


def make_step(
    model: Model, settings: Settings, *, optimizer: optax.GradientTransformation | None = None
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """A pure step (state, batch, key) -> (state, metrics) on a `PairBatch`, or a `RankingBatch`.

    The metrics are `train/loss`, `train/accuracy` (share of pairs whose chosen response scores
    higher at its end), `train/margin` (mean difference), `train/grad_norm` and `perf/tokens`, f32[]
    each. The means are over pairs; of rankings, over prompts of the means over their pairs. There
    is no dropout, and the key is not used.

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
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)

    def step(state, batch, key):
        del key
        grads, metrics = accumulated_gradients(
            functools.partial(_loss, model, settings, state.frozen),
            _count,
            state.params,
            batch,
            None,
            settings.gradient_accumulation_steps,
        )
        params, opt_state, norm = apply_gradients(optimizer, state.params, state.opt_state, grads)
        metrics = {f"train/{name}": value for name, value in metrics.items()}
        metrics["train/grad_norm"] = norm
        metrics["perf/tokens"] = sum(jnp.sum(mask, dtype=jnp.float32) for mask in _masks(batch))
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    return step


def make_eval_step(model: Model) -> Callable[[Params, Batch], Metrics]:
    """A pure (params, batch) -> {"loss", "accuracy", "margin", "count"}: sums over pairs.

    The parameters are full. The loss is that of "last_token" on every pair, also of a
    `RankingBatch`, so that all objectives are evaluated alike.
    """

    def evaluate(params, batch):
        if isinstance(batch, RankingBatch):
            metrics, count = _sums_of_rankings(model, params, batch)
            return {**metrics, "count": count}
        _, metrics = _last_token_loss(model, params, batch, None, 0.0, 1.0)
        return {**metrics, "count": jnp.sum(batch.valid, dtype=jnp.float32)}

    return evaluate


def make_score_step(model: Model) -> Callable[[Params, Batch], jax.Array]:
    """A pure (params, batch) -> f32[B, K] of end scores; of pairs K is 2, the chosen one first.

    The parameters are full.
    """

    def score(params, batch):
        return end_scores(model, params, sequences_of(batch))

    return score


def sequences_of(batch: Batch) -> Sequences:
    """All K responses to each prompt, the best one first: K is 2 for pairs."""
    if isinstance(batch, RankingBatch):
        return Sequences(*batch)
    responses = jnp.stack([batch.chosen, batch.rejected], axis=1)
    mask = jnp.stack([batch.chosen_mask, batch.rejected_mask], axis=1)
    return Sequences(batch.prompts, batch.prompt_mask, responses, mask)


def _masks(batch):
    """The masks of the tokens of a batch, prompts once."""
    if isinstance(batch, RankingBatch):
        return batch.prompt_mask, batch.mask
    return batch.prompt_mask, batch.chosen_mask, batch.rejected_mask


def _loss(model, settings, frozen, params, batch, key, denominator=None):
    """(loss, metrics) of the objective."""
    del key
    if settings.objective == "ranking":
        return _ranking_loss(model, params, batch, frozen, denominator)
    if settings.objective == "tokenwise":
        return _tokenwise_loss(model, params, batch, frozen, denominator)
    return _last_token_loss(model, params, batch, frozen, settings.center_coef, denominator)


def _parts(params, frozen):
    """({"model": upper layers, "head"}, lower layers or None) for `rollout.score`."""
    upper, lower = trainable.stacks(Trainable(params["model"], frozen))
    return {**params, "model": upper}, lower


def _last_token_loss(model, params, batch, frozen, center_coef, denominator):
    params, lower = _parts(params, frozen)
    scores = end_scores(model, params, sequences_of(batch), frozen=lower)
    loss, metrics = pairwise_loss(
        scores[:, 0],
        scores[:, 1],
        margin=batch.margin,
        center_coef=center_coef,
        mask=batch.valid,
        denominator=denominator,
    )
    return loss, {"loss": loss, "accuracy": metrics["accuracy"], "margin": metrics["margin"]}


def _count(batch):
    """f32[]: the number of pairs, or of prompts with a pair, that the losses are means over."""
    if isinstance(batch, RankingBatch):
        return jnp.sum(jnp.sum(jnp.any(batch.mask, axis=2), axis=1) > 1, dtype=jnp.float32)
    return jnp.sum(batch.valid, dtype=jnp.float32)


def _tokenwise_loss(model, params, batch, frozen, denominator):
    params, lower = _parts(params, frozen)
    scores = token_scores(model, params, sequences_of(batch), frozen=lower)
    loss, metrics = tokenwise_pairwise_loss(
        scores[:, 0],
        scores[:, 1],
        batch.chosen,
        batch.rejected,
        batch.chosen_mask,
        batch.rejected_mask,
        mask=batch.valid,
        denominator=denominator,
    )
    return loss, {"loss": loss, "accuracy": metrics["accuracy"], "margin": metrics["margin"]}


def _ranking_loss(model, params, batch, frozen, denominator):
    params, lower = _parts(params, frozen)
    scores = end_scores(model, params, sequences_of(batch), frozen=lower)
    loss, metrics = ranking_loss(scores, jnp.any(batch.mask, axis=2), denominator=denominator)
    return loss, {"loss": loss, **metrics}


def _sums_of_rankings(model, params, batch):
    """(sums over all pairs of the rankings, their number), with equal weights."""
    scores, real = end_scores(model, params, sequences_of(batch)), jnp.any(batch.mask, axis=2)
    place = jnp.arange(real.shape[1])
    pairs = real[:, :, None] & real[:, None, :] & (place[:, None] < place)
    better = jnp.broadcast_to(scores[:, :, None], pairs.shape).reshape(-1)
    worse = jnp.broadcast_to(scores[:, None, :], pairs.shape).reshape(-1)
    loss, metrics = pairwise_loss(better, worse, mask=pairs.reshape(-1), denominator=1.0)
    return {"loss": loss, **metrics}, jnp.sum(pairs, dtype=jnp.float32)
