"""The training stages of a run as the report shows them: numbers, charts and samples."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from rlhf_jax import training
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.report import plots
from rlhf_jax.runtime.report.charts import Chart, Point
from rlhf_jax.runtime.report.samples import Sample, logged_samples
from rlhf_jax.runtime.report.tables import Cells, Entry
from rlhf_jax.runtime.report.values import duration, file_text, number, short
from rlhf_jax.runtime.run.folder import read_lines
from rlhf_jax.training.trainer import Trainer

# Of a folder without the configuration of one trainer.
UNKNOWN = Trainer("run", "Training", "Training", "", settings=object, reads=lambda settings: "text")


class Tile(NamedTuple):
    """A headline metric: its label, its last value, and its first value or nothing."""

    label: str
    value: str
    start: str = ""


class Log(NamedTuple):
    """The metrics of a stage.

    Attributes:
      trainer: of the stage.
      folder: of the stage.
      steps: one dict of metrics for each step, in order.
      metrics: name -> its points (step, value).
      summary: such as "400 steps in 12 min".
      start: seconds since 1970, or None.
    """

    trainer: Trainer
    folder: epath.Path
    steps: list[dict[str, Any]]
    metrics: dict[str, list[Point]]
    summary: str
    start: float | None


class Stage(NamedTuple):
    """One training stage of the page."""

    key: str
    title: str
    summary: str
    tiles: Sequence[Tile] = ()
    tradeoff: Chart | None = None
    main: Sequence[Chart] = ()
    pairs: Sequence[Chart] = ()
    diagnostics: Sequence[Chart] = ()
    others: Sequence[Chart] = ()
    table: Cells = []
    samples: Sequence[Sample] = ()
    samples_title: str = ""


def stage_folders(folder: epath.Path) -> list[tuple[Trainer | None, epath.Path]]:
    """The stages of a run folder with their trainers: its subfolders, or itself, trainer unknown.

    Empty for the folder of an evaluation alone.
    """
    places = [(trainer, folder / trainer.name) for trainer in training.TRAINERS]
    stages: list[tuple[Trainer | None, epath.Path]] = [each for each in places if each[1].is_dir()]
    trained = (folder / "metrics.jsonl").exists() or holds_config_of_a_run(folder)
    if stages or (not trained and (folder / "evaluation.json").exists()):
        return stages
    return [(None, folder)]


def holds_config_of_a_run(folder: epath.Path) -> bool:
    """Whether there is a `config.yaml` other than that of `evaluate`, which has a `kind`."""
    file = folder / "config.yaml"
    return file.exists() and "kind" not in _sections(file)


def _sections(file: epath.Path) -> list[str]:
    """The keys at the top of a YAML file; none without the file."""
    return re.findall(r"^(\w+):", file_text(file), re.MULTILINE)


def read_log(trainer: Trainer | None, folder: epath.Path, notes: list[str]) -> Log:
    """The metrics of a stage, whose trainer is that of its configuration if it is None.

    A sentence about a missing or broken file, and values that are not finite, is added to `notes`.
    """
    lines = read_or_note(folder / "metrics.jsonl", notes)
    steps = merge_steps(lines)
    metrics = series(steps)
    trainer = trainer or _trainer_of(_sections(folder / "config.yaml"))
    for name, points in metrics.items():
        bad = [step for step, value in points if not math.isfinite(value)]
        if bad:
            notes.append(
                f"{trainer.title}: {name} is not finite in {len(bad)} of {len(points)} logged "
                f"steps, first in step {bad[0]:.0f}."
            )
    times = [x for line in lines if (x := number(line.get("time"))) is not None]
    summary = f"{steps[-1]['step']:,.0f} steps" if steps else ""
    if steps and len(times) > 1:
        summary += f" in {duration(max(times) - min(times))}"
    return Log(trainer, folder, steps, metrics, summary, min(times, default=None))


def stage_of(log: Log, key: str, evaluation: Entry, table: Cells, notes: list[str]) -> Stage:
    """A stage by its metrics, its samples and the content of its `evaluation.json`."""
    samples, samples_title = logged_samples(read_or_note(log.folder / "samples.jsonl", notes))
    return Stage(
        key=key,
        title=log.trainer.title,
        summary=log.summary,
        tiles=tiles(log),
        tradeoff=plots.tradeoff_chart(log.trainer, log.steps),
        main=plots.metric_charts(plots.main_plots(log.trainer), log.metrics),
        pairs=plots.pair_charts(evaluation),
        diagnostics=plots.metric_charts(plots.diagnostic_plots(log.trainer), log.metrics),
        others=plots.metric_charts(plots.other_plots(log.trainer, [log.metrics]), log.metrics),
        table=table,
        samples=samples,
        samples_title=samples_title,
    )


def read_or_note(path: epath.Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a JSONL file; an error of the file becomes a note."""
    name = f"{path.parent.name}/{path.name}"
    try:
        lines = read_lines(path)
    except InputError as error:
        notes.append(f"{name} cannot be read: {error}.")
        return []
    if not lines and path.name == "metrics.jsonl":
        state = "is empty" if path.exists() else "is missing"
        notes.append(f"{name} {state}: there are no curves to show.")
    return lines


def merge_steps(lines: Iterable[Entry]) -> list[dict[str, Any]]:
    """One dict of all metrics for each step, in the order of the steps.

    A step may have several lines, such as one of training and one of evaluation; of a metric in
    both the later value counts. `objective/scores` are those before they were scaled, since the
    scale changes from step to step.
    """
    steps: dict[float, dict[str, Any]] = {}
    for line in lines:
        step = number(line.get("step"))
        if step is not None:
            steps.setdefault(step, {}).update({**line, "step": step})
    for metrics in steps.values():
        if "objective/unscaled_scores" in metrics:
            metrics["objective/scores"] = metrics["objective/unscaled_scores"]
    return [steps[step] for step in sorted(steps)]


def series(steps: Sequence[Entry]) -> dict[str, list[Point]]:
    """Metric name -> its points (step, value)."""
    points: dict[str, list[Point]] = {}
    for metrics in steps:
        for name, value in metrics.items():
            y = number(value)
            if y is not None and name not in ("step", "time"):
                points.setdefault(name, []).append((metrics["step"], y))
    return points


def _trainer_of(sections: Sequence[str]) -> Trainer:
    """The trainer of a run by the sections of its configuration; without one, a bare record."""
    named = [trainer for trainer in training.TRAINERS if trainer.name in sections]
    return named[0] if len(named) == 1 else UNKNOWN


def tiles(log: Log) -> list[Tile]:
    """The headline metrics: each on held-out examples if it was evaluated, else in training."""
    shown = []
    for metric, label, shows_start in log.trainer.headlines:
        held_out = f"eval/{metric.partition('/')[2]}"
        for name, where in ((held_out, "held-out"), (metric, "training")):
            values = [value for _, value in log.metrics.get(name, ()) if math.isfinite(value)]
            if values:
                start = short(values[0]) if shows_start and len(values) > 1 else ""
                shown.append(
                    Tile(f"{log.trainer.label}, {where} {label}", short(values[-1]), start)
                )
                break
    return shown


def compared_stages(runs: Mapping[str, Sequence[Log]]) -> list[Stage]:
    """The stages of several runs, each with charts of one line for each run that has it."""
    stages = []
    trainers = dict.fromkeys(log.trainer for logs in runs.values() for log in logs)
    for trainer in trainers:
        metrics: dict[str, plots.Metrics] = {
            name: next((log.metrics for log in logs if log.trainer == trainer), {})
            for name, logs in runs.items()
        }
        stages.append(
            Stage(
                key=trainer.name,
                title=trainer.title,
                summary="",
                main=plots.compared_charts(plots.main_plots(trainer), metrics),
                diagnostics=plots.compared_charts(plots.diagnostic_plots(trainer), metrics),
                others=plots.compared_charts(plots.other_plots(trainer, metrics.values()), metrics),
            )
        )
    return stages
