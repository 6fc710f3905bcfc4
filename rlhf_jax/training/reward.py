"""The reward model: a scalar head on a language model, trained on compared responses."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.batches import PairBatch, RankingBatch
from rlhf_jax.errors import InputError
from rlhf_jax.functional import pairwise_loss, ranking_loss, tokenwise_pairwise_loss
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import end_scores, token_scores
from rlhf_jax.training import frozen
from rlhf_jax.training.accumulate import accumulated_gradients, check_steps
from rlhf_jax.training.state import (
    OptimizerSettings,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
)

Metrics = dict[str, jax.Array]
Batch = PairBatch | RankingBatch
Objective = Literal["last_token", "tokenwise", "ranking"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `reward` of a configuration.

    Attributes:
      objective: what is compared. "last_token": the scores at the last tokens of a pair.
        "tokenwise": those at every token from the first in which the pair differs. "ranking": the
        last scores of all responses to a prompt, each two of them, a prompt counting once. It is
        evaluated on pairs by their last scores whatever it is trained on.
      batch_size: pairs a step, or rankings.
      gradient_accumulation_steps: parts that a batch is run in, one after another, to save memory;
        the step is that of the whole batch.
      num_epochs: passes over the data; may be a fraction.
      center_coef: weight of the squared sum of both scores, which keeps them near 0; of
        "last_token" alone.
      eval_batch_size: pairs, or rankings, a step of the evaluation.
      normalize_before: scales and shifts the fresh, or given, reward model before its training,
        until its scores of preferred responses have mean 0 and variance 1.
      normalize_after: likewise after its training: what is written and evaluated at the end.
      normalize_rows: of the preferred responses of so many training rows, or of all.
      num_layers_unfrozen: so many upper layers are trained, with the final layer norm and the head;
        0 trains these two alone. The layers below and the embeddings are frozen. Null trains all.
    """

    objective: Objective = "last_token"
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    num_epochs: float = 1.0
    center_coef: float = 0.0
    eval_batch_size: int = 32
    normalize_before: bool = False
    normalize_after: bool = False
    normalize_rows: int = 256
    num_layers_unfrozen: int | None = None

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise InputError(
                f"reward.objective must be one of {', '.join(get_args(Objective))}, but is "
                f"{self.objective!r}."
            )
        for name in ("batch_size", "num_epochs", "eval_batch_size"):
            if getattr(self, name) <= 0:
                raise InputError(f"reward.{name} must be above 0, but is {getattr(self, name)}.")
        check_steps("reward", self.batch_size, self.gradient_accumulation_steps)
        if self.normalize_rows < 2:
            raise InputError(
                f"reward.normalize_rows must be at least 2, but is {self.normalize_rows}."
            )
        if self.num_layers_unfrozen is not None and self.num_layers_unfrozen < 0:
            raise InputError(
                "reward.num_layers_unfrozen must not be negative, but is "
                f"{self.num_layers_unfrozen}; null trains all layers."
            )
        if self.center_coef < 0:
            raise InputError(f"reward.center_coef must not be negative, but is {self.center_coef}.")
        if self.center_coef > 0 and self.objective != "last_token":
            raise InputError(
                f"reward.center_coef is {self.center_coef}, but only the objective last_token has "
                f"that term; set it to 0 for {self.objective}."
            )


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

    Returns:
      A state of which `full_params` gives the reward model.

    Raises:
      InputError: more layers are to be trained than the model has.
    """
    if set(params) != {"model", "head"}:
        params = init_params(model, params, key)
    lower, trained = frozen.split_params(
        model, params["model"], settings.num_layers_unfrozen, "reward"
    )
    return init_train_state(
        {**params, "model": trained}, optimizer or make_optimizer(OptimizerSettings()), lower
    )


def full_params(model: Model, state: TrainState) -> Params:
    """{"model": ..., "head": ...} of a state, frozen layers included."""
    trunk = frozen.full_params(model, state.frozen, state.params["model"])
    return {**state.params, "model": trunk}


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
    optimizer = optimizer or make_optimizer(OptimizerSettings())

    def loss_fn(params, batch, key, denominator, *, lower):
        del key
        if settings.objective == "ranking":
            return _ranking_loss(model, params, batch, lower, denominator)
        if settings.objective == "tokenwise":
            return _tokenwise_loss(model, params, batch, lower, denominator)
        return _loss(model, params, batch, settings.center_coef, lower, denominator)

    def step(state, batch, key):
        del key
        loss = functools.partial(loss_fn, lower=state.frozen)
        grads, metrics = accumulated_gradients(
            loss, _count, state.params, batch, None, settings.gradient_accumulation_steps
        )
        params, opt_state, norm = apply_gradients(optimizer, state.params, state.opt_state, grads)
        metrics = {f"train/{name}": value for name, value in metrics.items()}
        metrics["train/grad_norm"] = norm
        metrics["perf/tokens"] = sum(jnp.sum(mask, dtype=jnp.float32) for mask in _masks(batch))
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    return step


def make_eval_step(model: Model) -> Callable[[Params, Batch], Metrics]:
    """A pure (params, batch) -> {"loss", "accuracy", "margin", "count"}: sums over pairs.

    The parameters are whole.

    The loss is that of "last_token" on every pair, also of a `RankingBatch`, so that all objectives
    are measured alike.
    """

    def evaluate(params, batch):
        if isinstance(batch, RankingBatch):
            metrics, count = _sums_of_rankings(model, params, batch)
            return {**metrics, "count": count}
        _, metrics = _loss(model, params, batch, 0.0, denominator=1.0)
        return {**metrics, "count": jnp.sum(batch.valid, dtype=jnp.float32)}

    return evaluate


def make_score_step(model: Model) -> Callable[[Params, Batch], jax.Array]:
    """A pure (params, batch) -> f32[B, K] of end scores; of pairs K is 2, the chosen one first.

    The parameters are whole.
    """

    def score(params, batch):
        return end_scores(model, params, batch.prompts, batch.prompt_mask, *responses_of(batch))

    return score


def responses_of(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(i32[B, K, T], bool[B, K, T]): all responses to each prompt, the best one first."""
    if isinstance(batch, RankingBatch):
        return batch.responses, batch.mask
    responses = jnp.stack([batch.chosen, batch.rejected], axis=1)
    return responses, jnp.stack([batch.chosen_mask, batch.rejected_mask], axis=1)


def _masks(batch):
    """The masks of all that is read of a batch."""
    if isinstance(batch, RankingBatch):
        return batch.prompt_mask, batch.mask
    return batch.prompt_mask, batch.chosen_mask, batch.rejected_mask


def _loss(model, params, batch, center_coef, lower=None, denominator=None):
    responses, masks = responses_of(batch)
    scores = end_scores(
        model, params, batch.prompts, batch.prompt_mask, responses, masks, frozen=lower
    )
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
    """f32[]: the pairs, or the prompts with a pair, that every loss here is a mean over."""
    if isinstance(batch, RankingBatch):
        return jnp.sum(jnp.sum(jnp.any(batch.mask, axis=2), axis=1) > 1, dtype=jnp.float32)
    return jnp.sum(batch.valid, dtype=jnp.float32)


def _tokenwise_loss(model, params, batch, lower, denominator=None):
    responses, masks = responses_of(batch)
    scores = token_scores(
        model, params, batch.prompts, batch.prompt_mask, responses, masks, frozen=lower
    )
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


def _ranking_loss(model, params, batch, lower, denominator=None):
    scores = end_scores(model, params, *batch, frozen=lower)
    loss, metrics = ranking_loss(scores, jnp.any(batch.mask, axis=2), denominator=denominator)
    return loss, {"loss": loss, **metrics}


def _sums_of_rankings(model, params, batch):
    """(sums over all pairs of the rankings, their number): each pair counts the same."""
    scores, real = end_scores(model, params, *batch), jnp.any(batch.mask, axis=2)
    place = jnp.arange(real.shape[1])
    pairs = real[:, :, None] & real[:, None, :] & (place[:, None] < place)
    better = jnp.broadcast_to(scores[:, :, None], pairs.shape).reshape(-1)
    worse = jnp.broadcast_to(scores[:, None, :], pairs.shape).reshape(-1)
    loss, metrics = pairwise_loss(better, worse, mask=pairs.reshape(-1), denominator=1.0)
    return {"loss": loss, **metrics}, jnp.sum(pairs, dtype=jnp.float32)
