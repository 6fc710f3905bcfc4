"""Pairs of responses scored by a reward model: what the files and the report say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.batches import RankingBatch
from rlhf_jax.runtime.evaluation import diagnostics
from rlhf_jax.runtime.report.charts import Chart, Curve, Point, Series, line_chart
from rlhf_jax.runtime.run.progress import short_number
from rlhf_jax.training import reward


class ScoredPairs(NamedTuple):
    """One entry for each pair, the preferred response first.

    Attributes:
      differences: float64[N], of the scores.
      length_differences: int64[N], of the lengths in tokens.
      margins: float64[N], by how much the data want the preferred one to win.
    """

    differences: np.ndarray
    length_differences: np.ndarray
    margins: np.ndarray


def score_pairs(
    score: Callable[[reward.Batch], jax.Array], batches: Iterable[reward.Batch]
) -> ScoredPairs:
    """The pairs of some batches, all that rankings have; rows that only fill up a batch left out.

    Args:
      score: a compiled `reward.make_score_step` with its parameters bound.
      batches: NumPy batches, as `eval_batches` gives them.
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
    rows, pairs = np.nonzero(real[:, better] & real[:, worse])
    first, second = better[pairs], worse[pairs]
    return ScoredPairs(
        scores[rows, first] - scores[rows, second],
        lengths[rows, first] - lengths[rows, second],
        margins[rows],
    )


def pair_evaluation(pairs: ScoredPairs) -> dict[str, Any]:
    """The content of `evaluation.json`: `metrics`, the `table` for a terminal, and under `pairs`
    the reliability curve (`calibration`) and the accuracy by length difference (`lengths`).
    """
    metrics = diagnostics.pair_metrics(*pairs)
    metrics["num_pairs"] = float(len(pairs.differences))
    curve = diagnostics.calibration(pairs.differences)
    lengths = diagnostics.accuracy_by_length(pairs.differences, pairs.length_differences)
    numbers = [{"metric": _NAMES.get(key, key), "after": value} for key, value in metrics.items()]
    of_confidence = [
        {
            "metric": f"right, confidence {b.low:.2f} to {b.high:.2f} ({b.num_pairs} pairs)",
            "after": b.correct,
        }
        for b in curve
    ]
    of_length = [
        {
            "metric": f"accuracy, preferred one {_range(b)} ({b.num_pairs} pairs)",
            "after": b.accuracy,
        }
        for b in lengths
    ]
    return {
        "metrics": metrics,
        "table": [*numbers, *of_confidence, *of_length],
        "samples": [],
        "pairs": {
            "calibration": [b._asdict() for b in curve],
            "lengths": [b._asdict() for b in lengths],
        },
    }


_NAMES = {
    "margin": "mean margin",
    "calibration_error": "expected calibration error",
    "longer_wins": "accuracy of the rule that longer wins",
    "prefers_longer": "longer response scored higher",
    "accuracy_where_longer": "accuracy where the preferred one is longer",
    "accuracy_where_shorter": "accuracy where the preferred one is shorter",
    "num_pairs": "pairs",
}


def _range(found: diagnostics.LengthBin) -> str:
    """The range of a bin in words, such as 3 to 7 tokens longer."""
    if found.low == found.high == 0:
        return "as long"
    low, high = sorted((abs(found.low), abs(found.high)))
    how_many = f"{low}" if low == high else f"{low} to {high}"
    return f"{how_many} tokens {'longer' if found.low > 0 else 'shorter'}"


def pair_charts(evaluation: Mapping[str, Any]) -> tuple[Chart, ...]:
    """The two curves of the report, as far as the content of an `evaluation.json` has them."""
    found, metrics = (_dict(evaluation.get(key)) for key in ("pairs", "metrics"))
    reliability = points_of(found.get("calibration"), "confidence", "correct")
    lengths = points_of(found.get("lengths"), "length_difference", "accuracy")
    ends = points_of(found.get("calibration"), "low", "high")
    ideal = tuple((x, x) for x in (ends[0][0], ends[-1][1])) if ends else ()
    rule = tuple((x, 1.0 if x > 0 else 0.0 if x < 0 else 0.5) for x, _ in lengths)
    error = _text(metrics.get("calibration_error"))
    charts = (
        line_chart(
            "Calibration",
            [Series("share right", reliability), Series("ideal", ideal)],
            note=f"expected error {error}" if error else "",
            x_label="confidence in the response scored higher",
        ),
        line_chart(
            "Accuracy by length",
            [Series("reward model", lengths), Series("rule: longer wins", rule)],
            x_label="preferred − other, tokens",
        ),
    )
    # The last point of such a curve says little: the legend has what holds for all pairs.
    overall = (("", ""), tuple(_text(metrics.get(name)) for name in ("accuracy", "longer_wins")))
    return tuple(
        dataclasses.replace(chart, curves=_with_numbers(chart.curves, numbers))
        for chart, numbers in zip(charts, overall, strict=True)
        if chart is not None
    )


def _with_numbers(curves: tuple[Curve, ...], numbers: tuple[str, ...]) -> tuple[Curve, ...]:
    pairs = zip(curves, numbers, strict=True)
    return tuple(dataclasses.replace(curve, last=number) for curve, number in pairs)


# The file may have been written by anyone: what has not the right type is as good as absent.
def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return short_number(value) if isinstance(value, int | float) else ""


def points_of(rows: Any, x: str, y: str) -> tuple[Point, ...]:
    """(x, y) of the rows that have both as numbers."""
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    pairs = [(row.get(x), row.get(y)) for row in rows]
    return tuple(
        (float(a), float(b))
        for a, b in pairs
        if isinstance(a, int | float) and isinstance(b, int | float)
    )
