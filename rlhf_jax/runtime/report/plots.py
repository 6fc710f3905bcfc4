"""The charts of the report: which metrics each one shows."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.runtime.evaluation.best_of import SCORE_NAMES
from rlhf_jax.runtime.report.charts import Chart, Point, Series, chart_of
from rlhf_jax.runtime.report.values import number
from rlhf_jax.runtime.run.progress import short_number
from rlhf_jax.training.trainer import Plot, Trainer

# Metric name -> its points (step, value).
Metrics = Mapping[str, Sequence[Point]]


def _both(metric: str) -> dict[str, str]:
    """A metric of training batches, and the same on held-out examples."""
    return {metric: "training", f"eval/{metric.partition('/')[2]}": "held-out"}


MAIN = (
    Plot("Loss", "nats", _both("train/loss")),
    Plot("Accuracy", "", _both("train/accuracy")),
    Plot("Margin", "chosen − rejected", _both("train/margin")),
    Plot("Perplexity", "", {"eval/perplexity": "held-out"}),
    Plot("ROUGE", "", {f"eval/rouge{name}": f"ROUGE-{name}" for name in ("1", "2", "L", "Lsum")}),
    Plot("Score", "mean per response", _both("objective/scores")),
    Plot("Gold score", "mean per response", _both("objective/gold")),
    Plot(
        "KL to the reference",
        "nats per response",
        _both("objective/kl") | {"objective/kl_exact": "over the vocabulary"},
    ),
    Plot(
        "Win rate",
        "over the initial policy",
        {
            "eval/win_rate": "by the gold score",
            "eval/win_rate_scores": "by the score",
            "eval/win_rate_judge": "by the judge",
        },
    ),
    Plot("RLHF reward", "score − KL penalty", {"objective/rlhf_reward": "reward"}),
    Plot("Entropy", "nats per response", {"objective/entropy": "entropy"}),
)
DIAGNOSTICS = (
    Plot("KL of the update", "nats per token", {"policy/approxkl_avg": "approximate KL"}),
    Plot("Entropy of the update", "nats per token", {"policy/entropy_avg": "entropy"}),
    Plot("Ratio", "new / old probability", {"val/ratio": "mean"}),
    Plot("KL coefficient", "", {"objective/kl_coef": "coefficient"}),
    Plot("Gradient norm", "", {"train/grad_norm": "norm"}),
    Plot("Throughput", "tokens per second", {"perf/tokens_per_sec": "tokens/s"}),
    Plot("Step time", "seconds", {"perf/step_time": "seconds"}),
)


def main_plots(trainer: Trainer) -> list[Plot]:
    """The curves of a trainer; those of its scores are on one chart."""
    plots = []
    for plot in (*MAIN, *trainer.plots):
        if "objective/scores" in plot.lines:
            plot = plot._replace(lines={**plot.lines, **trainer.score_labels, **plot.lines})
        plots.append(plot)
    return plots


def diagnostic_plots(trainer: Trainer) -> list[Plot]:
    """The diagnostics of a trainer."""
    return [*trainer.diagnostics, *DIAGNOSTICS]


def metric_charts(plots: Iterable[Plot], metrics: Metrics) -> list[Chart]:
    """Lines over the step, of the plots with at least one finite point."""
    charts = []
    for title, unit, names in plots:
        lines = [Series(label, metrics[name]) for name, label in names.items() if name in metrics]
        charts.append(chart_of(title, lines, note=unit))
    return [chart for chart in charts if chart is not None]


def compared_charts(plots: Iterable[Plot], runs: Mapping[str, Metrics]) -> list[Chart]:
    """A chart of each metric of the plots, with a line for each run by name."""
    charts = []
    for title, unit, names in plots:
        for name, label in names.items():
            lines = [
                Series(run, metrics.get(name, ()), colour=index)
                for index, (run, metrics) in enumerate(runs.items())
            ]
            charts.append(
                chart_of(f"{title}, {label}" if len(names) > 1 else title, lines, note=unit)
            )
    return [chart for chart in charts if chart is not None]


def other_plots(trainer: Trainer, runs: Iterable[Metrics]) -> list[Plot]:
    """A plot of each metric that is on none of the plots above, by name."""
    plots = (*main_plots(trainer), *diagnostic_plots(trainer))
    plotted = {name for plot in plots for name in plot.lines}
    return [Plot(name, "", {name: name}) for name in sorted(set().union(*runs) - plotted)]


def tradeoff_chart(trainer: Trainer, steps: list[dict[str, Any]]) -> Chart | None:
    """Score and gold score over the KL; the score is overoptimized where only it still rises.

    Gao et al., Scaling Laws for Reward Model Overoptimization, figure 1 (arXiv:2210.10760), with
    the KL itself rather than its root on the axis.
    """
    points = functools.partial(_points, steps, "objective/kl")
    lines = [Series(text, points(name)) for name, text in trainer.score_labels.items()]
    lines.append(Series("gold score", points("objective/gold"), colour=2))
    if sum(bool(line.points) for line in lines) < 2:
        return None
    label = "KL to the reference, nats per response"
    return chart_of("Score and gold score over KL", lines, x_label=label, dots=True)


def best_of_charts(evaluation: Mapping[str, Any]) -> tuple[Chart, ...]:
    """The best-of-n curve, if the content of `evaluation.json` has one.

    The score is overoptimized where it rises and the gold score falls.
    """
    curve = evaluation.get("best_of")
    lines = [Series(text, _points(curve, "kl", key)) for key, text in SCORE_NAMES.items()]
    note = f"n = {', '.join(f'{n:.0f}' for n, _ in _points(curve, 'n', 'kl'))}"
    chart = chart_of("Best of n", lines, note=note, x_label="KL to the policy at most, nats")
    return () if chart is None else (chart,)


def pair_charts(evaluation: Mapping[str, Any]) -> tuple[Chart, ...]:
    """Calibration and accuracy by length, as far as the content of `evaluation.json` has them.

    The legend of the accuracy shows the value over all pairs.
    """
    pairs, metrics = (_dict(evaluation.get(key)) for key in ("pairs", "metrics"))
    bounds = _points(pairs.get("calibration"), "low", "high")
    ideal = [(x, x) for x in (bounds[0][0], bounds[-1][1])] if bounds else []
    lengths = _points(pairs.get("lengths"), "length_difference", "accuracy")
    rule = [(x, 1.0 if x > 0 else 0.0 if x < 0 else 0.5) for x, _ in lengths]
    error = _short(metrics.get("calibration_error"))
    charts = (
        chart_of(
            "Calibration",
            [
                Series(
                    "share right", _points(pairs.get("calibration"), "confidence", "correct"), ""
                ),
                Series("ideal", ideal, ""),
            ],
            note=f"expected error {error}" if error else "",
            x_label="confidence in the response scored higher",
        ),
        chart_of(
            "Accuracy by length",
            [
                Series("reward model", lengths, _short(metrics.get("accuracy"))),
                Series("rule: longer wins", rule, _short(metrics.get("longer_wins"))),
            ],
            x_label="preferred − other, tokens",
        ),
    )
    return tuple(filter(None, charts))


# The file may have been written by another program: values of a wrong type count as absent.
def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    x = number(value)
    return "" if x is None else short_number(x)


def _points(entries: Any, x: str, y: str) -> list[Point]:
    """(x, y) of the entries that have both as numbers."""
    entries = entries if isinstance(entries, list) else []
    pairs = ((number(e.get(x)), number(e.get(y))) for e in entries if isinstance(e, dict))
    return [(a, b) for a, b in pairs if a is not None and b is not None]
