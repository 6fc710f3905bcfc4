"""Evaluation of reward models on held-out pairs of responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.batches import RankingBatch
from rlhf_jax.runtime.evaluation import diagnostics
from rlhf_jax.runtime.evaluation.diagnostics import with_interval
from rlhf_jax.training import reward


class ScoredPairs(NamedTuple):
    """Scores of N pairs, the preferred response first.

    Attributes:
      differences: float64[N], of the scores.
      length_differences: int64[N], of the lengths in tokens.
      margins: float64[N], the margin of the data by which the preferred response should win.
    """

    differences: np.ndarray
    length_differences: np.ndarray
    margins: np.ndarray


def score_pairs(
    score: Callable[[reward.Batch], jax.Array], batches: Iterable[reward.Batch]
) -> ScoredPairs:
    """The pairs of all batches, and every two responses of rankings; inert ones are left out.

    Args:
      score: a compiled `reward.make_score_step` with its parameters bound.
      batches: NumPy batches, as from `eval_batches`.
    """
    parts = [_pairs_of(batch, np.asarray(score(batch), np.float64)) for batch in batches]
    return ScoredPairs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _pairs_of(batch: reward.Batch, scores: np.ndarray) -> ScoredPairs:
    if isinstance(batch, RankingBatch):
        lengths, margins = np.sum(batch.mask, axis=2), np.zeros(len(scores))
        real = lengths > 0
    else:
        masks = (batch.chosen_mask, batch.rejected_mask)
        lengths = np.stack([np.sum(mask, axis=1) for mask in masks], axis=1)
        margins = np.asarray(batch.margin, np.float64)
        real = np.repeat(np.asarray(batch.valid)[:, None], 2, axis=1)
    better, worse = np.triu_indices(scores.shape[1], k=1)
    prompts, pairs = np.nonzero(real[:, better] & real[:, worse])
    first, second = better[pairs], worse[pairs]
    return ScoredPairs(
        scores[prompts, first] - scores[prompts, second],
        lengths[prompts, first] - lengths[prompts, second],
        margins[prompts],
    )


def pair_evaluation(pairs: ScoredPairs) -> dict[str, Any]:
    """The content of `evaluation.json`: `metrics`, `table`, and two curves under `pairs`.

    `accuracy_low` and `accuracy_high` are the bounds of the 95 % bootstrap interval over pairs.
    """
    metrics = diagnostics.pair_metrics(*pairs)
    metrics["num_pairs"] = float(len(pairs.differences))
    table = [{"metric": _NAMES.get(key, key), "after": x} for key, x in metrics.items()]
    accuracy = with_interval("accuracy", pairs.differences > 0)
    bounds = [accuracy["accuracy_low"], accuracy["accuracy_high"]]
    table[list(metrics).index("accuracy")]["interval"] = bounds
    curve = diagnostics.calibration(pairs.differences)
    lengths = diagnostics.accuracy_by_length(pairs.differences, pairs.length_differences)
    return {
        "metrics": metrics | accuracy,
        "table": table,
        "samples": [],
        "pairs": {
            "calibration": [b._asdict() for b in curve],
            "lengths": [b._asdict() for b in lengths],
        },
    }


def curve_table(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two curves of `pair_evaluation` as entries of a table for a terminal."""
    values = {}
    for each in evaluation["pairs"]["calibration"]:
        b = diagnostics.CalibrationBin(**each)
        values[f"right, confidence {b.low:.2f} to {b.high:.2f} ({b.num_pairs} pairs)"] = b.correct
    for each in evaluation["pairs"]["lengths"]:
        c = diagnostics.LengthBin(**each)
        values[f"accuracy, preferred one {_range(c)} ({c.num_pairs} pairs)"] = c.accuracy
    return [{"metric": name, "after": value} for name, value in values.items()]


_NAMES = {
    "loss": "loss (nats per pair)",
    "margin": "mean margin",
    "calibration_error": "expected calibration error",
    "longer_wins": "accuracy of the rule that longer wins",
    "prefers_longer": "longer response scored higher",
    "accuracy_where_longer": "accuracy where the preferred one is longer",
    "accuracy_where_shorter": "accuracy where the preferred one is shorter",
    "num_pairs": "pairs",
}


def _range(lengths: diagnostics.LengthBin) -> str:
    """The range of a bin in words, such as 3 to 7 tokens longer."""
    if lengths.low == lengths.high == 0:
        return "as long"
    low, high = sorted((abs(lengths.low), abs(lengths.high)))
    tokens = f"{low}" if low == high else f"{low} to {high}"
    return f"{tokens} tokens {'longer' if lengths.low > 0 else 'shorter'}"
