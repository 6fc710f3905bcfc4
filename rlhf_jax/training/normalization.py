"""Reward models normalized to scores of mean 0 and variance 1 on a set of responses."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.rollout.shaping import ScoreStats, empty_score_stats, update_score_stats
from rlhf_jax.training.reward import Batch, sequences_of
from rlhf_jax.training.trainable import Trainable, stacks


def make_stats_step(model: Model) -> Callable[..., ScoreStats]:
    """A pure (params, stats, batch, frozen=None) -> stats, with the scores of preferred responses.

    `params` and `frozen` are those of a `TrainState` of a reward model. Padding of a batch is left
    out.
    """

    def add(params, stats, batch, frozen=None):
        sequences = sequences_of(batch)
        preferred = sequences._replace(tokens=sequences.tokens[:, :1], mask=sequences.mask[:, :1])
        upper, lower = stacks(Trainable(params["model"], frozen))
        scores = end_scores(model, {**params, "model": upper}, preferred, frozen=lower)
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

    so that w' . h' = (w . h - mean) / deviation. A reward head has no bias: the shift goes into the
    final layer norm (`Model.shift_final`), and the exported folder is still one whose scores
    transformers reads as they are. The hidden states move by mean / |w|, all alike and along w.

    Args:
      params: {"model": ..., "head": {"kernel": f32[D]}}; of the model's, those that
        `shift_final` changes.
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
    shift = -mean * kernel / jnp.sum(jnp.square(kernel))
    return {
        **params,
        "model": model.shift_final(params["model"], shift),
        "head": {**params["head"], "kernel": kernel / deviation},
    }


def stats_of(
    step: Callable[[Params, ScoreStats, Batch], ScoreStats],
    params: Params,
    batches: Iterable[Batch],
) -> ScoreStats:
    """Statistics of the scores of some batches; `step` is a compiled `make_stats_step`."""
    stats = empty_score_stats()
    for batch in batches:
        stats = step(params, stats, batch)
    return stats
