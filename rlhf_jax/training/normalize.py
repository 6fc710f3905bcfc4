"""Reward models whose scores of given responses have mean 0 and variance 1."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.training.ppo_scores import ScoreStats, init_score_stats, update_score_stats
from rlhf_jax.training.reward import Batch, responses_of


def make_stats_step(model: Model) -> Callable[..., ScoreStats]:
    """A pure (params, stats, batch, frozen=None) -> stats, with the scores of the preferred
    responses added.

    `params` are those of a reward model, above its frozen half where that is given. Rows that only
    fill up a batch count nowhere.
    """

    def add(params, stats, batch, frozen=None):
        responses, mask = (x[:, :1] for x in responses_of(batch))
        rows = (batch.prompts, batch.prompt_mask, responses, mask)
        scores = end_scores(model, params, *rows, frozen=frozen)
        return update_score_stats(stats, scores[:, 0], jnp.any(mask, axis=(1, 2)))

    return add


def score_moments(stats: ScoreStats) -> tuple[float, float]:
    """(mean, deviation) of the scores, the deviation without Bessel's correction.

    Raises:
      InputError: the scores do not differ, as those of a head that is zero.
    """
    count, mean, squares = (float(x) for x in jax.device_get(stats))
    deviation = (squares / max(count, 1.0)) ** 0.5
    # Equal scores differ from their mean by rounding, which is nothing to divide by.
    if not deviation > 1e-6 * abs(mean):
        raise InputError(
            f"The scores of {count:.0f} responses cannot be normalized, for they do not differ "
            f"(mean {mean:.4g}, deviation {deviation:.4g}): give more rows, or set "
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
      params: {"model": ..., "head": {"kernel": f32[D]}}; of the model's, what `shift_final` moves.
      mean, deviation: f32[] of its scores; the kernel is not zero, or they would not differ.

    Ziegler et al., Fine-Tuning Language Models from Human Preferences, section 2.1
    (arXiv:1909.08593); openai/lm-human-preferences has a gain and a bias of their own for it.

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
    """Of the scores of some batches; `step` is a compiled `make_stats_step`."""
    stats = init_score_stats()
    for batch in batches:
        stats = step(params, stats, batch)
    return stats
