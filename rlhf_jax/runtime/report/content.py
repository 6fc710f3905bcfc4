"""The content of the report: stages with their tiles and charts, tables, and samples."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from rlhf_jax import training
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.report import plots
from rlhf_jax.runtime.report.charts import Chart, Point
from rlhf_jax.runtime.report.values import brief, change, duration, number, short, text
from rlhf_jax.runtime.run.folder import read_lines
from rlhf_jax.training.trainer import Trainer

Entry = Mapping[str, Any]  # a line of a JSONL file, or an element of a list in evaluation.json

MAX_SAMPLES = 24


class Tile(NamedTuple):
    """A headline metric: its label, its last value, and its first value or nothing."""

    label: str
    value: str
    start: str = ""


class Side(NamedTuple):
    """One text of a sample, with its numbers as (name, text, direction)."""

    heading: str
    text: str
    numbers: tuple[tuple[str, str, str], ...] = ()


class Sample(NamedTuple):
    """A prompt and the texts beside one another."""

    prompt: str
    sides: tuple[Side, ...]


class Stage(NamedTuple):
    """One training stage of the page."""

    key: str
    title: str
    summary: str
    tiles: tuple[Tile, ...]
    tradeoff: Chart | None
    main: tuple[Chart, ...]
    pairs: tuple[Chart, ...]
    diagnostics: tuple[Chart, ...]
    others: tuple[Chart, ...]
    samples: tuple[Sample, ...]
    samples_title: str


# --- stages --------------------------------------------------------------------------------------


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
    return re.findall(r"^(\w+):", file.read_text(), re.MULTILINE) if file.exists() else []


def read_stage(
    trainer: Trainer | None, folder: epath.Path, evaluation: Entry, notes: list[str]
) -> Stage:
    """A stage by the files in its folder and the content of its `evaluation.json`.

    The trainer is that of its configuration or metrics if it is None. A sentence about each missing
    or broken file is added to `notes`.
    """
    lines = _read_or_note(folder / "metrics.jsonl", notes)
    steps = merge_steps(lines)
    metrics = series(steps)
    key = "run" if trainer is None else trainer.name
    trainer = trainer or _trainer_of(_sections(folder / "config.yaml"), metrics)
    _note_not_finite(trainer.title, metrics, notes)
    return Stage(
        key,
        trainer.title,
        _summary(lines),
        _tiles(trainer, metrics),
        plots.tradeoff_chart(steps),
        plots.metric_charts(plots.MAIN, metrics),
        plots.pair_charts(evaluation),
        plots.metric_charts(plots.DIAGNOSTICS, metrics),
        plots.other_charts(metrics),
        *logged_samples(_read_or_note(folder / "samples.jsonl", notes)),
    )


def _read_or_note(path: epath.Path, notes: list[str]) -> list[dict[str, Any]]:
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
    both the later value counts. `objective/scores` are those before PPO scaled them, since their
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


def _trainer_of(sections: Sequence[str], metrics: Iterable[str]) -> Trainer:
    """The trainer of a run by the sections of its configuration, else by its metrics."""
    named = [trainer for trainer in training.TRAINERS if trainer.name in sections]
    if len(named) == 1:
        return named[0]
    names = set(metrics)
    online = any(name.startswith("objective/") for name in names)
    pairs = not online and bool({"train/margin", "eval/margin"} & names)
    kinds = {(each.online, each.trains == "reward_model"): each for each in training.TRAINERS[::-1]}
    return kinds.get((online, pairs), training.TRAINERS[0])


def _tiles(trainer: Trainer, metrics: plots.Metrics) -> tuple[Tile, ...]:
    tiles = []
    for metric, label, shows_start in trainer.headlines:
        values = [value for _, value in metrics.get(metric, ()) if math.isfinite(value)]
        if values:
            start = short(values[0]) if shows_start and len(values) > 1 else ""
            tiles.append(Tile(f"{trainer.label}, {label}", short(values[-1]), start))
    return tuple(tiles)


def _summary(lines: Sequence[Entry]) -> str:
    """Steps and time of a stage, such as "400 steps in 12 min"."""
    steps, times = (
        [x for line in lines if (x := number(line.get(name))) is not None]
        for name in ("step", "time")
    )
    summary = f"{max(steps):,.0f} steps" if steps else ""
    if not steps or len(times) < 2:
        return summary
    return f"{summary} in {duration(max(times) - min(times))}"


def _note_not_finite(title: str, metrics: plots.Metrics, notes: list[str]) -> None:
    for name, points in metrics.items():
        bad = [step for step, value in points if not math.isfinite(value)]
        if bad:
            notes.append(
                f"{title}: {name} is not finite in {len(bad)} of {len(points)} logged steps, "
                f"first in step {bad[0]:.0f}."
            )


# --- evaluation.json -----------------------------------------------------------------------------


def read_evaluation(path: epath.Path, notes: list[str]) -> dict[str, Any]:
    """The parts of `evaluation.json` that have the right type; an error becomes a note."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        notes.append(f"{path.name} cannot be read: {error}.")
        return {}
    types = {"metrics": dict, "table": list, "samples": list, "pairs": dict, "best_of": list}
    content = content if isinstance(content, dict) else {}
    parts = {k: content[k] for k, kind in types.items() if isinstance(content.get(k), kind)}
    for key in ("table", "samples"):
        parts[key] = [entry for entry in parts.get(key, []) if isinstance(entry, dict)]
    if not any(parts.values()):
        notes.append(f"{path.name} holds no metrics, no table and no samples.")
    return parts


def format_table(entries: Sequence[Entry]) -> str:
    """The "table" of `evaluation.json` as aligned text for a terminal.

    >>> print(format_table([{"metric": "gold score", "before": 0.5, "after": 1.75},
    ...                     {"metric": "KL", "before": None, "after": 4.0}]))
    metric      before  after  change
    ----------  ------  -----  ------
    gold score     0.5   1.75   +1.25
    KL               –      4       –
    """
    header, *body = table_cells(entries)
    widths = [max(map(len, column)) for column in zip(header, *body)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
        for cells in (header, rule, *body)
    )


def table_cells(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """Lines of cells, the header first: metric, before, after, change; or metric and value."""
    names = [text(entry.get("metric", "")) for entry in entries]
    values = [short(entry.get("after")) + _interval(entry) for entry in entries]
    if is_of_one(entries):
        return [("metric", "value"), *zip(names, values, strict=True)]
    befores = [short(entry.get("before")) for entry in entries]
    changes = []
    for entry in entries:
        before, after = number(entry.get("before")), number(entry.get("after"))
        changes.append("–" if before is None or after is None else change(before, after))
    header = ("metric", "before", "after", "change")
    return [header, *zip(names, befores, values, changes, strict=True)]


def is_of_one(entries: Sequence[Entry]) -> bool:
    """Whether a table is of one model, without values before."""
    return bool(entries) and all(entry.get("before") is None for entry in entries)


def metric_cells(evaluation: Entry) -> list[tuple[str, str]]:
    """(name, value) of the metrics, empty if the table shows all values."""
    cells = [(name, short(value)) for name, value in evaluation.get("metrics", {}).items()]
    in_table = {short(entry.get("after")) for entry in evaluation.get("table", [])}
    return [] if all(value in in_table for _, value in cells) else cells


def _interval(entry: Entry) -> str:
    """The interval, such as " (0.81 to 0.93)", or nothing."""
    bounds = entry.get("interval")
    if not isinstance(bounds, list) or len(bounds) != 2 or None in map(number, bounds):
        return ""
    return f" ({short(bounds[0])} to {short(bounds[1])})"


# --- samples -------------------------------------------------------------------------------------


def are_of_two(samples: Sequence[Entry]) -> bool:
    """Whether the samples of `evaluation.json` are of two policies."""
    return not any("response" in entry for entry in samples)


def evaluation_sample(entry: Entry) -> Sample:
    """A sample of `evaluation.json`: the prompt's response, or those before and after."""
    prompt = text(entry.get("prompt", ""))
    if "response" in entry:
        return Sample(prompt, _sides(entry, "Response"))
    sides = []
    for key, heading in (("before", "Before"), ("after", "After")):
        numbers = []
        for name in ("gold", "score"):
            value, start = number(entry.get(f"{key}_{name}")), number(entry.get(f"before_{name}"))
            if value is None:
                continue
            direction = ""
            if key == "after" and start is not None and value != start:
                direction = "up" if value > start else "down"
            numbers.append((name, brief(value), direction))
        if key == "after" and number(entry.get("kl")) is not None:
            numbers.append(("KL", brief(entry["kl"]), ""))
        sides.append(Side(heading, text(entry.get(key, "")), tuple(numbers)))
    return Sample(prompt, tuple(sides))


def logged_samples(lines: Sequence[Entry]) -> tuple[tuple[Sample, ...], str]:
    """The last samples of `samples.jsonl`, each beside the first one for its prompt, and a title.

    Several responses to one prompt are matched by their label, such as "chosen" or "place 2".
    """
    steps = [number(line.get("step")) for line in lines]
    if not any(step is not None for step in steps):
        return (), ""
    first_step, last_step = (
        pick(step for step in steps if step is not None) for pick in (min, max)
    )
    last = [line for line, step in zip(lines, steps) if step == last_step][:MAX_SAMPLES]
    first = {_key(x): x for x, step in zip(lines, steps) if step == first_step < last_step}
    samples = []
    for line in last:
        before = _sides(first.get(_key(line), {}), f"Step {first_step:,.0f}")
        after = _sides(line, f"Step {last_step:,.0f}")
        samples.append(Sample(text(line.get("prompt", "")), (*before, *after)))
    return tuple(samples), f"Samples of step {last_step:,.0f}"


def _key(line: Entry) -> tuple[str, str]:
    return text(line.get("prompt", "")), text(line.get("label", ""))


def _sides(line: Entry, heading: str) -> tuple[Side, ...]:
    """The response of a line with its numbers, and the other texts of the line."""
    numbers = tuple(
        (name, brief(value), "")
        for name, value in line.items()
        if name not in ("step", "prompt", "response") and number(value) is not None
    )
    others = [
        Side(name, value)
        for name, value in line.items()
        if isinstance(value, str) and name not in ("prompt", "response") and number(value) is None
    ]
    response = [Side(heading, text(line["response"]), numbers)] if "response" in line else []
    return (*response, *others)
