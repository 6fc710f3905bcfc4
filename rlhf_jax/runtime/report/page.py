"""`report.html`: what a run did, on one page that needs nothing but itself.

The page is made from the files of the run folder alone (`metrics.jsonl`, `samples.jsonl`,
`config.yaml`, `evaluation.json`), so it can be made again at any time, also of a run that was
broken off. What is missing is named on the page. The page loads nothing: its
Content-Security-Policy forbids it, and forbids every script but its own, whatever a sampled text
contains.
"""

import base64
import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.resources
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.evaluation.best_of import best_of_charts
from rlhf_jax.runtime.evaluation.pairs import pair_charts
from rlhf_jax.runtime.report.charts import Chart, Series, dot_chart, line_chart
from rlhf_jax.runtime.report.seed_metrics import Spread, seeds_of, split_seeds
from rlhf_jax.runtime.run.folder import disk_errors, read_lines, replace_file
from rlhf_jax.runtime.run.progress import short_number

Row = Mapping[str, Any]

STAGES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "ppo": "PPO",
}
PACKAGES = (
    "rlhf-jax", "jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint",
    "numpy", "transformers", "tokenizers", "datasets",
)  # fmt: skip
MAX_SAMPLES = 24


@dataclasses.dataclass(frozen=True)
class _Plot:
    """A chart of the report: its title, a note on the unit, and the metrics with their legends."""

    title: str
    note: str
    lines: tuple[tuple[str, str], ...]


_MAIN = (
    _Plot("Loss", "nats", (("train/loss", "train"), ("eval/loss", "evaluation"))),
    _Plot("Accuracy", "", (("train/accuracy", "train"), ("eval/accuracy", "evaluation"))),
    _Plot(
        "Margin", "chosen − rejected", (("train/margin", "train"), ("eval/margin", "evaluation"))
    ),
    _Plot("Perplexity", "", (("eval/perplexity", "evaluation"),)),
    _Plot(
        "ROUGE",
        "",
        (
            ("eval/rouge1", "ROUGE-1"),
            ("eval/rouge2", "ROUGE-2"),
            ("eval/rougeL", "ROUGE-L"),
            ("eval/rougeLsum", "ROUGE-Lsum"),
        ),
    ),
    _Plot("Score", "mean per response", (("objective/scores", "score"),)),
    _Plot("Gold score", "mean per response", (("objective/gold", "gold score"),)),
    _Plot(
        "KL to the reference",
        "nats per response",
        (("objective/kl", "KL"), ("objective/kl_exact", "over the vocabulary")),
    ),
    _Plot("RLHF reward", "score − KL penalty", (("objective/rlhf_reward", "reward"),)),
    _Plot("Entropy", "nats per response", (("objective/entropy", "entropy"),)),
)
_DIAGNOSTICS = (
    _Plot("Policy loss", "", (("loss/policy_avg", "policy"),)),
    _Plot("Value loss", "", (("loss/value_avg", "value"),)),
    _Plot(
        "Clipped share",
        "of tokens",
        (("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "value")),
    ),
    _Plot("KL of the update", "nats per token", (("policy/approxkl_avg", "approximate KL"),)),
    _Plot("Entropy of the update", "nats per token", (("policy/entropy_avg", "entropy"),)),
    _Plot("Ratio", "new / old probability", (("val/ratio", "mean"),)),
    _Plot("KL coefficient", "", (("objective/kl_coef", "coefficient"),)),
    _Plot("Gradient norm", "", (("train/grad_norm", "norm"),)),
    _Plot("Throughput", "tokens per second", (("perf/tokens_per_sec", "tokens/s"),)),
    _Plot("Step time", "seconds", (("perf/step_time", "seconds"),)),
)
_HIGHLIGHTS = {  # by stage: (metric, what the tile says, whether to show what it started from)
    "sft": (("eval/loss", "SFT, loss", True), ("eval/perplexity", "SFT, perplexity", True)),
    "reward": (("eval/accuracy", "Reward, accuracy", True),),
    "ppo": (
        ("objective/gold", "PPO, gold score", True),
        ("objective/scores", "PPO, score", True),
        ("objective/kl", "PPO, KL", False),
    ),
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """One headline number: what it is, the value, and what it started from."""

    label: str
    value: str
    start: str = ""


@dataclasses.dataclass(frozen=True)
class Side:
    """One text of a sample, with the numbers that belong to it as (name, text, direction)."""

    heading: str
    text: str
    numbers: tuple[tuple[str, str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and the texts that are read next to one another."""

    prompt: str
    sides: tuple[Side, ...]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage as the page shows it."""

    key: str
    title: str
    summary: str
    main: tuple[Chart, ...]
    pairs: tuple[Chart, ...]
    diagnostics: tuple[Chart, ...]
    others: tuple[Chart, ...]
    samples: tuple[Sample, ...]
    samples_title: str


def write_report(run_dir: str | os.PathLike[str]) -> epath.Path:
    """Writes `run_dir/report.html` and returns its path.

    `run_dir` is the folder of one stage, or that of `run_rlhf` with the folders `sft`, `reward` and
    `ppo` in it, and optionally holds an `evaluation.json`; or it is that of `evaluate` and holds
    nothing else but a `config.yaml`:

        {"metrics": {name: number},
         "table": [{"metric": name, "before": number | null, "after": number | null,
                    "interval": [low, high] of "after", where there is one}],
         "samples": [{"prompt", "before", "after": text, "before_gold", "after_gold",
                      "before_score", "after_score", "kl": number}],
                     or of one policy [{"prompt", "response": text, "gold", "score": number}],
         "pairs": {"calibration", "lengths": [{name: number}]},      as `pair_evaluation` makes it
         "best_of": [{"n", "kl", "scores", "gold": number}]}

    Every part is optional; numbers that JSON lacks are the strings "NaN", "Infinity", "-Infinity".

    Raises:
      InputError: there is no such folder, or it cannot be written.
    """
    folder = epath.Path(run_dir)
    if not folder.is_dir():
        raise InputError(f"there is no run folder {run_dir}; give the --run_dir of a run")
    notes: list[str] = []
    places = [(key, folder / key) for key in STAGES if (folder / key).is_dir()]
    if not places and not _is_evaluation_alone(folder):
        places = [("", folder)]
    rows = {
        place: [_unscaled(row) for row in _rows(place / "metrics.jsonl", notes)]
        for _, place in places
    }
    evaluation = _evaluation(folder / "evaluation.json", notes)
    judged = {
        place: evaluation if place == folder else _evaluation(place / "evaluation.json", notes)
        for _, place in places
    }
    table, samples = evaluation.get("table", []), evaluation.get("samples", [])
    stages = [_stage(key, place, rows[place], judged[place], notes) for key, place in places]
    page = _template().render(
        title=folder.name,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        notes=notes,
        tiles=[tile for key, place in places for tile in _tiles(key, rows[place])],
        tradeoff=next(filter(None, (_tradeoff(rows[place]) for _, place in places)), None),
        curves=(*best_of_charts(evaluation), *(() if places else pair_charts(evaluation))),
        table=_table(table) if table else [],
        table_title="Evaluation" if _are_of_one(table) else "Before and after",
        metrics=_metrics(evaluation),
        samples=[_evaluated(row) for row in samples[:MAX_SAMPLES]],
        samples_title="Samples before and after" if _are_of_two(samples) else "Samples",
        samples_total=len(samples),
        stages=stages,
        configs=_configs(folder, places),
        versions=_versions(),
    )
    path = folder / "report.html"
    with disk_errors(folder):
        replace_file(path, page.encode("utf-8", "replace"))
    return path


def format_table(rows: Sequence[Row]) -> str:
    """The rows of `evaluation.json`'s "table" as aligned text for a terminal.

    >>> print(format_table([{"metric": "gold score", "before": 0.5, "after": 1.75},
    ...                     {"metric": "KL", "before": None, "after": 4.0}]))
    metric      before  after  change
    ----------  ------  -----  ------
    gold score     0.5   1.75   +1.25
    KL               –      4       –
    """
    header, *body = _table(rows)
    widths = [max(map(len, column)) for column in zip(header, *body)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
        for cells in (header, rule, *body)
    )


def _unscaled(row: Row) -> Row:
    """A row with the score before PPO scaled it: what it is divided by moves from step to step."""
    if "objective/unscaled_scores" not in row:
        return row
    return {**row, "objective/scores": row["objective/unscaled_scores"]}


def _rows(path: epath.Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a JSONL file; what is wrong with the file becomes a note."""
    name = f"{path.parent.name}/{path.name}"
    try:
        rows = read_lines(path)
    except InputError as error:
        notes.append(f"{name} cannot be read: {error}.")
        return []
    if not rows and path.name == "metrics.jsonl":
        state = "is empty" if path.exists() else "is missing"
        notes.append(f"{name} {state}: there are no curves to show.")
    return rows


def _evaluation(path: epath.Path, notes: list[str]) -> dict[str, Any]:
    """The content of `evaluation.json` with only those parts that have the right type."""
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
        parts[key] = [row for row in parts.get(key, []) if isinstance(row, dict)]
    if not any(parts.values()):
        notes.append(f"{path.name} holds no metrics, no table and no samples.")
    return parts


def _is_evaluation_alone(folder: epath.Path) -> bool:
    """Whether there is an evaluation, and nothing that a run leaves."""
    if not (folder / "evaluation.json").exists() or (folder / "metrics.jsonl").exists():
        return False
    return not holds_config_of_a_run(folder)


def holds_config_of_a_run(folder: epath.Path) -> bool:
    """Whether there is a `config.yaml` that `evaluate` did not write, whose own has a `kind`."""
    file = folder / "config.yaml"
    return file.exists() and not re.search(r"^kind:", file.read_text(), re.MULTILINE)


def _stage(
    key: str, folder: epath.Path, rows: Sequence[Row], evaluation: Row, notes: list[str]
) -> Stage:
    series = _series(rows)
    metrics, spreads = split_seeds(series)
    named = {name for plot in (*_MAIN, *_DIAGNOSTICS) for name, _ in plot.lines}
    rest = sorted(set(metrics) - named)
    title = STAGES[key or _kind(metrics)]
    _note_not_finite(title, metrics, notes)
    samples, samples_title = _logged_samples(_rows(folder / "samples.jsonl", notes))
    return Stage(
        key=key or "run",
        title=title,
        summary=_summary(rows) + _seeds(len(seeds_of(series))),
        main=_charts(_MAIN, metrics, spreads),
        pairs=pair_charts(evaluation),
        diagnostics=_charts(_DIAGNOSTICS, metrics, spreads),
        others=_charts([_Plot(name, "", ((name, name),)) for name in rest], metrics, spreads),
        samples=samples,
        samples_title=samples_title,
    )


def _series(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Metric name -> its points (step, value)."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        step = _number(row.get("step"))
        for name, value in row.items():
            number = _number(value)
            if step is not None and number is not None and name not in ("step", "time"):
                series.setdefault(name, []).append((step, number))
    return series


def _charts(
    plots: Iterable[_Plot],
    metrics: Mapping[str, Sequence[tuple[float, float]]],
    spreads: Mapping[str, Spread],
) -> tuple[Chart, ...]:
    """Lines over the step; of several seeds, their mean and behind it one deviation around it."""
    charts = []
    for plot in plots:
        lines = [
            Series(label, tuple(metrics[name]), spreads[name].band if name in spreads else ())
            for name, label in plot.lines
            if name in metrics
        ]
        charts.append(line_chart(plot.title, lines, note=plot.note))
    return tuple(chart for chart in charts if chart is not None)


def _tradeoff(rows: Sequence[Row]) -> Chart | None:
    """Score and gold score over the KL paid for them: where they part, the first is overfitted.

    Gao et al., Scaling Laws for Reward Model Overoptimization, figure 1 (arXiv:2210.10760), with
    the KL itself rather than its root on the axis.
    """
    lines = []
    for name, label in (("objective/scores", "score"), ("objective/gold", "gold score")):
        pairs = ((_number(row.get("objective/kl")), _number(row.get(name))) for row in rows)
        points = tuple((x, y) for x, y in pairs if x is not None and y is not None)
        lines.append(Series(label, points))
    if not all(line.points for line in lines):
        return None
    return dot_chart(
        "Score and gold score over KL", lines, x_label="KL to the reference, nats per response"
    )


def _note_not_finite(
    title: str, metrics: Mapping[str, Sequence[tuple[float, float]]], notes: list[str]
) -> None:
    for name, points in metrics.items():
        bad = [step for step, value in points if not math.isfinite(value)]
        if bad:
            notes.append(
                f"{title}: {name} is not finite in {len(bad)} of {len(points)} logged steps, "
                f"first in step {bad[0]:.0f}."
            )


def _tiles(key: str, rows: Sequence[Row]) -> list[Tile]:
    metrics, spreads = split_seeds(_series(rows))
    tiles = []
    for name, label, with_start in _HIGHLIGHTS[key or _kind(metrics)]:
        values = [value for _, value in metrics.get(name, ()) if math.isfinite(value)]
        if values:
            start = _value(values[0]) if with_start and len(values) > 1 else ""
            around = f" ± {_value(spreads[name].deviation)}" if name in spreads else ""
            tiles.append(Tile(label, _value(values[-1]) + around, start))
    return tiles


def _kind(metrics: Iterable[str]) -> str:
    """The stage that logs such metrics."""
    if any(name.startswith("objective/") for name in metrics):
        return "ppo"
    return "reward" if {"train/margin", "eval/margin"} & set(metrics) else "sft"


def _summary(rows: Sequence[Row]) -> str:
    """Steps and time of a stage, as in "400 steps in 12 min"."""
    steps = [step for step in (_number(row.get("step")) for row in rows) if step is not None]
    times = [time for time in (_number(row.get("time")) for row in rows) if time is not None]
    if not steps:
        return ""
    text = f"{max(steps):,.0f} steps"
    if len(times) > 1:
        text += f" in {_duration(max(times) - min(times))}"
    return text


def _seeds(count: int) -> str:
    return f"; mean of {count} seeds, ± one standard deviation" if count else ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Rows of text, the heading first: metric, before, after, change; or metric and value."""
    if _are_of_one(rows):
        values = [_value(row.get("after")) + _interval(row) for row in rows]
        names = [_text(row.get("metric", "")) for row in rows]
        return [("metric", "value"), *zip(names, values, strict=True)]
    result: list[tuple[str, ...]] = [("metric", "before", "after", "change")]
    for row in rows:
        before, after = _number(row.get("before")), _number(row.get("after"))
        change = "–" if before is None or after is None else _change(before, after)
        cells = (_value(row.get("before")), _value(row.get("after")) + _interval(row), change)
        result.append((_text(row.get("metric", "")), *cells))
    return result


def _are_of_one(rows: Sequence[Row]) -> bool:
    """Whether the rows of a table are of one model, with nothing before."""
    return bool(rows) and all(row.get("before") is None for row in rows)


def _metrics(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Metrics with values as text: none of single seeds, and none if the table has them all."""
    metrics = evaluation.get("metrics", {}).items()
    found = [(name, _value(value)) for name, value in metrics if not seeds_of([name])]
    table = {_value(row.get("after")) for row in evaluation.get("table", [])}
    return [] if all(text in table for _, text in found) else found


def _interval(row: Row) -> str:
    """The interval of a row as in " (0.81 to 0.93)", or nothing."""
    ends = row.get("interval")
    if not isinstance(ends, list) or len(ends) != 2 or None in map(_number, ends):
        return ""
    return f" ({_value(ends[0])} to {_value(ends[1])})"


def _change(before: float, after: float) -> str:
    text = _value(after - before)
    return text if text.startswith("-") or text in ("0", "nan") else f"+{text}"


def _are_of_two(samples: Sequence[Row]) -> bool:
    """Whether `evaluation.json`'s samples are of two policies."""
    return not any("response" in row for row in samples)


def _evaluated(row: Row) -> Sample:
    """One of `evaluation.json`'s samples: the prompt's response, or those before and after."""
    if "response" in row:
        return Sample(_text(row.get("prompt", "")), _sides(row, "Response"))
    sides = []
    for key, heading in (("before", "Before"), ("after", "After")):
        numbers = []
        for name in ("gold", "score"):
            value, start = _number(row.get(f"{key}_{name}")), _number(row.get(f"before_{name}"))
            if value is None:
                continue
            direction = ""
            if key == "after" and start is not None and value != start:
                direction = "up" if value > start else "down"
            numbers.append((name, _brief(value), direction))
        if key == "after" and _number(row.get("kl")) is not None:
            numbers.append(("KL", _brief(row["kl"]), ""))
        sides.append(Side(heading, _text(row.get(key, "")), tuple(numbers)))
    return Sample(_text(row.get("prompt", "")), tuple(sides))


def _logged_samples(rows: Sequence[Row]) -> tuple[tuple[Sample, ...], str]:
    """The last samples of `samples.jsonl`, each beside the first one for its prompt if any.

    Several responses to one prompt are told apart by their label, such as "chosen" or "place 2".
    """
    steps = [_number(row.get("step")) for row in rows]
    known = [step for step in steps if step is not None]
    if not known:
        return (), ""
    first_step, last_step = min(known), max(known)
    last = [row for row, step in zip(rows, steps) if step == last_step][:MAX_SAMPLES]
    first = {_place(row): row for row, step in zip(rows, steps) if step == first_step < last_step}
    samples = []
    for row in last:
        prompt, before = _text(row.get("prompt", "")), first.get(_place(row))
        sides = () if before is None else _sides(before, f"Step {first_step:,.0f}")
        samples.append(Sample(prompt, (*sides, *_sides(row, f"Step {last_step:,.0f}"))))
    return tuple(samples), f"Samples of step {last_step:,.0f}"


def _place(row: Row) -> tuple[str, str]:
    return _text(row.get("prompt", "")), _text(row.get("label", ""))


def _sides(row: Row, heading: str) -> tuple[Side, ...]:
    """The response of a row with the row's numbers, and whatever other texts the row has."""
    numbers = tuple(
        (name, _brief(value), "")
        for name, value in row.items()
        if name not in ("step", "prompt", "response") and _number(value) is not None
    )
    others = [
        Side(name, value)
        for name, value in row.items()
        if isinstance(value, str) and name not in ("prompt", "response") and _number(value) is None
    ]
    response = [Side(heading, _text(row["response"]), numbers)] if "response" in row else []
    return (*response, *others)


def _configs(folder: epath.Path, stages: Sequence[tuple[str, epath.Path]]) -> list[tuple[str, str]]:
    """(where, text) of the run's `config.yaml`, or, if it has none, of those of its stages."""
    places = [folder] if (folder / "config.yaml").exists() else [place for _, place in stages]
    paths = [place / "config.yaml" for place in places]
    return [
        (f"{path.parent.name}/{path.name}", path.read_text()) for path in paths if path.exists()
    ]


def _versions() -> list[tuple[str, str]]:
    """Python, the machine, and the installed packages that a result may depend on."""
    found = [("python", platform.python_version()), ("platform", platform.platform(terse=True))]
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue  # the report lists what is there
    return found


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["csp_hash"] = _csp_hash
    source = importlib.resources.files("rlhf_jax.runtime.report").joinpath("report.html.j2")
    return environment.from_string(source.read_text("utf-8"))


def _csp_hash(script: str) -> str:
    """The expression by which a Content-Security-Policy allows exactly this inline script."""
    digest = hashlib.sha256(str(script).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _number(value: Any) -> float | None:
    """The number that a JSON value stands for (the strings for NaN and infinities too), or None."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def _value(value: Any) -> str:
    """A value for people: four significant digits, "–" for what is not there."""
    number = _number(value)
    if number is None:
        return "–" if value is None else _text(value)
    if math.isfinite(number) and abs(number) >= 10_000:
        return short_number(number)
    return f"{round(number, 4):.4g}" if abs(number) >= 1e-3 else f"{number:.2g}"


def _brief(value: Any) -> str:
    """A number of a sample: two decimals."""
    number = _number(value)
    return _value(value) if number is None or abs(number) >= 1e3 else f"{number:.2f}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
