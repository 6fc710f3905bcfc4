"""The reward model: a scalar head on a language model, trained on compared responses."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.batches import PairBatch, RankingBatch, Sequences
from rlhf_jax.errors import InputError
from rlhf_jax.functional import pairwise_loss, ranking_loss, tokenwise_pairwise_loss
from rlhf_jax.models.adapters import adapters_of
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import end_scores, token_scores
from rlhf_jax.rollout.shaping import ScoreStats, update_score_stats
from rlhf_jax.training import trainable
from rlhf_jax.training.epochs import Metrics
from rlhf_jax.training.reward_settings import TRAINER, Objective, Settings
from rlhf_jax.training.state import TrainState, init_train_state, make_optimizer, offline_step
from rlhf_jax.training.trainable import Trainable

__all__ = [
    "Batch",
    "Objective",
    "Settings",
    "full_params",
    "init_params",
    "init_state",
    "make_eval_step",
    "make_score_step",
    "make_stats_step",
    "make_step",
    "normalize_scores",
    "score_moments",
    "sequences_of",
]

Batch = PairBatch | RankingBatch


def init_params(model: Model, params: Params, key: jax.Array) -> Params:
    """{"model": params, "head": a fresh reward head}, without an unembedding.

    The head has a bias, which starts at 0, where `normalize_scores` needs one.
    """
    return _with_bias(model, {"model": params, "head": init_reward_head(key, model.config.n_embd)})


def _shifts_final(model):
    """Whether normalization shifts the final norm, which has a bias and is trained."""
    return model.final_has_bias and adapters_of(model) is None


def _with_bias(model: Model, params: Params) -> Params:
    head = params["head"]
    if not _shifts_final(model) and "bias" not in head:
        head = {**head, "bias": jnp.zeros((), jnp.float32)}
    return {"model": model.without_unembedding(params["model"]), "head": head}


def init_state(
    model: Model,
    params: Params,
    settings: Settings,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """The state before the first step, from a language model's parameters.

    The state holds `params` themselves: a step that donates it consumes them.

    Args:
      params: a language model's full parameters, to which a fresh head is added, or
        {"model": ..., "head": ...} of a reward model to be trained further.

    Raises:
      InputError: more layers are to be trained than the model has.
    """
    if set(params) != {"model", "head"}:
        params = init_params(model, params, key)
    params = _with_bias(model, params)
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

    loss_fn, steps = functools.partial(_loss, model, settings), settings.gradient_accumulation_steps

    def step(state, batch, key):
        del key
        state, metrics = offline_step(loss_fn, _count, optimizer, state, batch, None, steps)
        masks = [x for name, x in batch._asdict().items() if name.endswith("mask")]
        tokens = sum(jnp.sum(mask, dtype=jnp.float32) for mask in masks)
        return state, {**metrics, "perf/tokens": tokens}

    return step


def make_eval_step(
    model: Model, settings: Settings | None = None
) -> Callable[[Params, Batch], Metrics]:
    """A pure (params, batch) -> {"loss", "accuracy", "margin", "count"}: sums over pairs.

    The parameters are full. The loss is that of "last_token" on every pair, also of a
    `RankingBatch`, so that all objectives are evaluated alike, and the settings are not read.
    """
    del settings

    def evaluate(params, batch):
        scores = end_scores(model, params, sequences_of(batch))
        if isinstance(batch, RankingBatch):
            loss, metrics, count = _sums_of_rankings(scores, jnp.any(batch.mask, axis=2))
        else:
            loss, metrics = _last_token_loss(scores, batch, 0.0, 1.0)
            count = _count(batch)
        return {"loss": loss, **metrics, "count": count}

    return evaluate


def make_score_step(model: Model) -> Callable[[Params, Batch], jax.Array]:
    """A pure (params, batch) -> f32[B, K] of end scores; of pairs K is 2, the chosen one first.

    The parameters are full.
    """

    def score(params, batch):
        return end_scores(model, params, sequences_of(batch))

    return score


def make_stats_step(model: Model) -> Callable[..., ScoreStats]:
    """A pure (params, stats, batch, frozen=None) -> stats, with the scores of preferred responses.

    `params` and `frozen` are those of a `TrainState`. Padding of a batch is left out.
    """

    def add(params, stats, batch, frozen=None):
        sequences = sequences_of(batch)
        preferred = sequences._replace(tokens=sequences.tokens[:, :1], mask=sequences.mask[:, :1])
        scores = _scores(end_scores, model, params, frozen, preferred)
        return update_score_stats(stats, scores[:, 0], jnp.any(preferred.mask, axis=(1, 2)))

    return add


def score_moments(stats: ScoreStats) -> tuple[float, float]:
    """(mean, deviation) of the scores, the deviation without Bessel's correction.

    Raises:
      InputError: the scores are all equal, as those of a head of zeros.
    """
    count, mean, squares = (float(x) for x in jax.device_get(stats))
    deviation = (squares / max(count, 1.0)) ** 0.5
    # Equal scores differ from their mean by rounding error, which is no deviation to divide by.
    if not deviation > 1e-6 * abs(mean):
        raise InputError(
            f"The scores of {count:.0f} responses cannot be normalized, for they do not differ "
            f"(mean {mean:.4g}, deviation {deviation:.4g}): give more examples, or set "
            "reward.normalize_before and reward.normalize_after to false."
        )
    return mean, deviation


def normalize_scores(
    model: Model, params: Params, mean: jax.Array | float, deviation: jax.Array | float
) -> Params:
    """A reward model's parameters under which it scores (score - mean) / deviation.

        w' = w / deviation
        h' = h - mean * w / |w|^2                for all hidden states h

    so that w' . h' = (w . h - mean) / deviation. The shift goes into the final layer norm
    (`Model.shift_final`), so that transformers, whose heads have no bias, scores an exported folder
    alike. The hidden states move by mean / |w|, all alike and along w.

    Where the final norm has no bias, or is frozen beside adapters, the bias of the head takes the
    shift, b' = (b - mean) / deviation, and the scores of transformers, which does not read it,
    differ by this constant.

    Args:
      params: {"model": ..., "head": {"kernel": f32[D], perhaps "bias": f32[]}}; of the model's,
        those that `shift_final` changes.
      mean, deviation: f32[] of its scores; the kernel is not zero, or they would not differ.

    Ziegler et al., Fine-Tuning Language Models from Human Preferences, section 2.1
    (arXiv:1909.08593); openai/lm-human-preferences has a separate gain and bias instead.

    >>> from rlhf_jax.models.gpt2 import GPT2, GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    >>> params = {"model": model.init(jax.random.key(0)), "head": {"kernel": jnp.arange(8.0)}}
    >>> normalized = normalize_scores(model, params, 3.0, 2.0)
    >>> state = jnp.arange(8.0) ** 2
    >>> before, after = (model.final(p["model"], state) @ p["head"]["kernel"]
    ...                  for p in (params, normalized))
    >>> print(f"{after:.4f} {(before - 3) / 2:.4f}")
    7.3125 7.3125
    """
    kernel = params["head"]["kernel"]
    if not _shifts_final(model):
        bias = (params["head"].get("bias", 0.0) - mean) / deviation
        return {**params, "head": {"kernel": kernel / deviation, "bias": jnp.float32(bias)}}
    shift = -mean * kernel / jnp.sum(jnp.square(kernel))
    return {
        **params,
        "model": model.shift_final(params["model"], shift),
        "head": jax.tree.map(lambda leaf: leaf / deviation, params["head"]),  # a bias, too
    }


def sequences_of(batch: Batch) -> Sequences:
    """All K responses to each prompt, the best one first: K is 2 for pairs."""
    if isinstance(batch, RankingBatch):
        return Sequences(*batch)
    responses = jnp.stack([batch.chosen, batch.rejected], axis=1)
    mask = jnp.stack([batch.chosen_mask, batch.rejected_mask], axis=1)
    return Sequences(batch.prompts, batch.prompt_mask, responses, mask)


def _loss(model, settings, frozen, params, batch, key, denominator):
    """(loss, metrics) of the objective."""
    del key
    scores_of = token_scores if settings.objective == "tokenwise" else end_scores
    scores = _scores(scores_of, model, params, frozen, sequences_of(batch))
    if settings.objective == "ranking":
        valid = jnp.any(batch.mask, axis=2)
        loss, metrics = ranking_loss(scores, valid, denominator=denominator)
    elif settings.objective == "tokenwise":
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
    else:
        loss, metrics = _last_token_loss(scores, batch, settings.center_coef, denominator)
    return loss, {"loss": loss, "accuracy": metrics["accuracy"], "margin": metrics["margin"]}


def _scores(scores_of, model, params, frozen, sequences):
    """Scores of a reward model whose language model may be the part above `frozen`."""
    upper, lower = trainable.stacks(Trainable(params["model"], frozen))
    return scores_of(model, {**params, "model": upper}, sequences, frozen=lower)


def _last_token_loss(scores, batch, center_coef, denominator):
    return pairwise_loss(
        scores[:, 0],
        scores[:, 1],
        margin=batch.margin,
        center_coef=center_coef,
        mask=batch.valid,
        denominator=denominator,
    )


def _count(batch):
    """f32[]: the number of pairs, or of prompts with a pair, that the losses are means over."""
    if isinstance(batch, RankingBatch):
        return jnp.sum(jnp.sum(jnp.any(batch.mask, axis=2), axis=1) > 1, dtype=jnp.float32)
    return jnp.sum(batch.valid, dtype=jnp.float32)


def _sums_of_rankings(scores, valid):
    """(sums over all pairs of the rankings, their number), with equal weights."""
    place = jnp.arange(valid.shape[1])
    pairs = valid[:, :, None] & valid[:, None, :] & (place[:, None] < place)
    better = jnp.broadcast_to(scores[:, :, None], pairs.shape).reshape(-1)
    worse = jnp.broadcast_to(scores[:, None, :], pairs.shape).reshape(-1)
    loss, metrics = pairwise_loss(better, worse, mask=pairs.reshape(-1), denominator=1.0)
    return loss, metrics, jnp.sum(pairs, dtype=jnp.float32)
