"""The charts of the report: which metrics each one shows."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.runtime.evaluation.best_of import SCORE_NAMES
from rlhf_jax.runtime.report.charts import Chart, Curve, Point, Series, dot_chart, line_chart
from rlhf_jax.runtime.report.values import number
from rlhf_jax.runtime.run.progress import short_number

# Metric name -> its points (step, value).
Metrics = Mapping[str, Sequence[Point]]


@dataclasses.dataclass(frozen=True)
class Plot:
    """Metrics over the training step.

    Attributes:
      title: of the chart.
      note: on the unit.
      lines: (metric, legend) of each line.
    """

    title: str
    note: str
    lines: tuple[tuple[str, str], ...]


MAIN = (
    Plot("Loss", "nats", (("train/loss", "train"), ("eval/loss", "evaluation"))),
    Plot("Accuracy", "", (("train/accuracy", "train"), ("eval/accuracy", "evaluation"))),
    Plot("Margin", "chosen − rejected", (("train/margin", "train"), ("eval/margin", "evaluation"))),
    Plot("Perplexity", "", (("eval/perplexity", "evaluation"),)),
    Plot(
        "ROUGE",
        "",
        (
            ("eval/rouge1", "ROUGE-1"),
            ("eval/rouge2", "ROUGE-2"),
            ("eval/rougeL", "ROUGE-L"),
            ("eval/rougeLsum", "ROUGE-Lsum"),
        ),
    ),
    Plot("Score", "mean per response", (("objective/scores", "score"),)),
    Plot("Gold score", "mean per response", (("objective/gold", "gold score"),)),
    Plot(
        "KL to the reference",
        "nats per response",
        (("objective/kl", "KL"), ("objective/kl_exact", "over the vocabulary")),
    ),
    Plot("RLHF reward", "score − KL penalty", (("objective/rlhf_reward", "reward"),)),
    Plot("Entropy", "nats per response", (("objective/entropy", "entropy"),)),
)
DIAGNOSTICS = (
    Plot("Policy loss", "", (("loss/policy_avg", "policy"),)),
    Plot("Value loss", "", (("loss/value_avg", "value"),)),
    Plot(
        "Clipped share",
        "of tokens",
        (("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "value")),
    ),
    Plot("KL of the update", "nats per token", (("policy/approxkl_avg", "approximate KL"),)),
    Plot("Entropy of the update", "nats per token", (("policy/entropy_avg", "entropy"),)),
    Plot("Ratio", "new / old probability", (("val/ratio", "mean"),)),
    Plot("KL coefficient", "", (("objective/kl_coef", "coefficient"),)),
    Plot("Gradient norm", "", (("train/grad_norm", "norm"),)),
    Plot("Throughput", "tokens per second", (("perf/tokens_per_sec", "tokens/s"),)),
    Plot("Step time", "seconds", (("perf/step_time", "seconds"),)),
)


def metric_charts(plots: Iterable[Plot], metrics: Metrics) -> tuple[Chart, ...]:
    """Lines over the step, of the plots with at least one finite point."""
    charts = []
    for plot in plots:
        lines = [
            Series(label, tuple(metrics[name])) for name, label in plot.lines if name in metrics
        ]
        charts.append(line_chart(plot.title, lines, note=plot.note))
    return tuple(chart for chart in charts if chart is not None)


def other_charts(metrics: Metrics) -> tuple[Chart, ...]:
    """A chart of each metric that is on none of the plots above, by name."""
    plotted = {name for plot in (*MAIN, *DIAGNOSTICS) for name, _ in plot.lines}
    others = sorted(set(metrics) - plotted)
    return metric_charts([Plot(name, "", ((name, name),)) for name in others], metrics)


def tradeoff_chart(steps: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Score and gold score over the KL; the score is overoptimized where only it still rises.

    Gao et al., Scaling Laws for Reward Model Overoptimization, figure 1 (arXiv:2210.10760), with
    the KL itself rather than its root on the axis.
    """
    lines = []
    for name, label in (("objective/scores", "score"), ("objective/gold", "gold score")):
        pairs = ((number(step.get("objective/kl")), number(step.get(name))) for step in steps)
        points = tuple((x, y) for x, y in pairs if x is not None and y is not None)
        lines.append(Series(label, points))
    if not all(line.points for line in lines):
        return None
    return dot_chart(
        "Score and gold score over KL", lines, x_label="KL to the reference, nats per response"
    )


def best_of_charts(evaluation: Mapping[str, Any]) -> tuple[Chart, ...]:
    """The best-of-n curve, if the content of `evaluation.json` has one.

    The score is overoptimized where it rises and the gold score falls.
    """
    curve = evaluation.get("best_of")
    lines = [Series(text, _points(curve, "kl", key)) for key, text in SCORE_NAMES.items()]
    note = f"n = {', '.join(f'{n:.0f}' for n, _ in _points(curve, 'n', 'kl'))}"
    chart = line_chart("Best of n", lines, note=note, x_label="KL to the policy at most, nats")
    return () if chart is None else (chart,)


def pair_charts(evaluation: Mapping[str, Any]) -> tuple[Chart, ...]:
    """Calibration and accuracy by length, as far as the content of `evaluation.json` has them."""
    pairs, metrics = (_dict(evaluation.get(key)) for key in ("pairs", "metrics"))
    reliability = _points(pairs.get("calibration"), "confidence", "correct")
    lengths = _points(pairs.get("lengths"), "length_difference", "accuracy")
    bounds = _points(pairs.get("calibration"), "low", "high")
    ideal = tuple((x, x) for x in (bounds[0][0], bounds[-1][1])) if bounds else ()
    rule = tuple((x, 1.0 if x > 0 else 0.0 if x < 0 else 0.5) for x, _ in lengths)
    error = _short(metrics.get("calibration_error"))
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
    # The legend shows the value over all pairs instead of the last point of the curve.
    overall = (("", ""), tuple(_short(metrics.get(name)) for name in ("accuracy", "longer_wins")))
    return tuple(
        dataclasses.replace(chart, curves=_with_numbers(chart.curves, numbers))
        for chart, numbers in zip(charts, overall, strict=True)
        if chart is not None
    )


def _with_numbers(curves: tuple[Curve, ...], numbers: tuple[str, ...]) -> tuple[Curve, ...]:
    pairs = zip(curves, numbers, strict=True)
    return tuple(dataclasses.replace(curve, last=text) for curve, text in pairs)


# The file may have been written by another program: values of a wrong type count as absent.
def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    return short_number(value) if isinstance(value, int | float) else ""


def _points(entries: Any, x: str, y: str) -> tuple[Point, ...]:
    """(x, y) of the entries that have both as numbers."""
    entries = entries if isinstance(entries, list) else []
    pairs = [(entry.get(x), entry.get(y)) for entry in entries if isinstance(entry, dict)]
    return tuple(
        (float(a), float(b))
        for a, b in pairs
        if isinstance(a, int | float) and isinstance(b, int | float)
    )
