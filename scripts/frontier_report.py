"""Points of the reward-KL frontier: their file, the table and the plot."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent / "lessons"))
from plots import Line, line_plot, save  # noqa: E402  (the lessons' own)

METHODS = {
    "start": "fine-tuned model",
    "ppo": "PPO on the gold score",
    "ppo_reward": "PPO on a reward model",
    "dpo": "DPO",
    "ipo": "IPO",
    "sft": "SFT on preferred",
}
COEFFICIENTS = {"ppo": "kl_coef", "ppo_reward": "kl_coef", "dpo": "beta", "ipo": "beta"}


class Curve(NamedTuple):
    """A run: its method, its coefficient (0 if it has none) and its seed."""

    method: str
    coefficient: float
    seed: int


class Point(NamedTuple):
    """An evaluation of a run, a line of `points.jsonl`.

    Attributes:
      method, coefficient, seed: of the run.
      step: optimizer steps, or iterations of PPO, before it.
      kl: mean of log(policy / fine-tuned model) of the policy's continuations, in nats.
      gold: their mean gold score.
      seconds: of the run until the evaluation.
    """

    method: str
    coefficient: float
    seed: int
    step: int
    kl: float
    gold: float
    seconds: float


def read_points(file: Path) -> list[Point]:
    """The points of a file; none if there is no file."""
    if not file.exists():
        return []
    return [Point(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def add_points(file: Path, points: Iterable[Point]) -> None:
    """Adds lines to the file, all at once."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write("".join(json.dumps(point._asdict()) + "\n" for point in points))


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that none with a smaller or equal KL surpasses, by increasing KL.

    >>> at = lambda kl, gold: Point("dpo", 0.1, 0, 1, kl, gold, 0.0)
    >>> [point.kl for point in frontier([at(3.0, 0.4), at(1.0, 0.3), at(2.0, 0.2)])]
    [1.0, 3.0]
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.kl, -each.gold)):
        if not best or point.gold > best[-1].gold:
            best.append(point)
    return best


def gold_within(points: Iterable[Point], limit: float) -> float:
    """The largest gold score of points with at most this KL; NaN if there is none."""
    return max((point.gold for point in points if point.kl <= limit), default=float("nan"))


def means_over_seeds(points: Iterable[Point]) -> list[Point]:
    """For each method, coefficient and step the mean KL and gold score over the seeds."""
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        groups.setdefault((point.method, point.coefficient, point.step), []).append(point)
    return [
        each[0]._replace(
            kl=float(np.mean([point.kl for point in each])),
            gold=float(np.mean([point.gold for point in each])),
        )
        for each in groups.values()
    ]


def table_of_last_steps(points: Sequence[Point]) -> str:
    """A Markdown table of the last step of each run: means and deviations over the seeds."""
    lines = ["| method | coefficient | KL, nats | gold score |", "| --- | --- | --- | --- |"]
    for method, coefficient in dict.fromkeys((each.method, each.coefficient) for each in points):
        own = [each for each in points if each[:2] == (method, coefficient)]
        step = max(each.step for each in own)
        last = [each for each in own if each.step == step]
        name = f"{COEFFICIENTS[method]} {coefficient:g}" if method in COEFFICIENTS else ""
        kl, gold = (_spread([getattr(each, key) for each in last]) for key in ("kl", "gold"))
        lines.append(f"| {METHODS[method]} | {name} | {kl} | {gold} |")
    return "\n".join(lines)


def table_of_frontiers(points: Sequence[Point], limits: Sequence[float]) -> str:
    """A Markdown table of the largest gold score within each KL: mean and deviation over seeds."""
    head = " | ".join(f"{limit:g}" for limit in limits)
    lines = [f"| KL at most, nats | {head} |", "| --- |" + " --- |" * len(limits)]
    for method in _methods(points):
        own = [each for each in points if each.method == method]
        seeds = sorted({each.seed for each in own})
        cells = [
            _spread([gold_within([p for p in own if p.seed == seed], limit) for seed in seeds])
            for limit in limits
        ]
        lines.append(f"| {METHODS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(points: list[Point], folder: Path) -> Path:
    """The plot: all points, and the frontiers of their means over seeds."""
    lines = []
    for colour, (method, name) in enumerate(METHODS.items()):
        own = [each for each in points if each.method == method]
        if not own:
            continue
        best = frontier(means_over_seeds(own))
        xs, ys = ([getattr(each, key) for each in own] for key in ("kl", "gold"))
        lines.append(Line("", xs, ys, colour=colour, dots=True))
        xs, ys = ([getattr(each, key) for each in best] for key in ("kl", "gold"))
        lines.append(Line(name, xs, ys, colour=colour))
    labels = "KL to the fine-tuned model, nats per continuation", "mean gold score"
    return save(folder, "frontier", line_plot("Gold score over KL", lines, labels=labels))


def _methods(points):
    present = {each.method for each in points}
    return [method for method in METHODS if method in present]


def _spread(values):
    """Text "mean ± deviation" of numbers, "-" if one is missing."""
    if not np.all(np.isfinite(values)):
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
