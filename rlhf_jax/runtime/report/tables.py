"""The content of `evaluation.json`, and its table as cells and as text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from rlhf_jax.runtime.report.values import change, number, short, text

Entry = Mapping[str, Any]  # a line of a JSONL file, or an element of a list in evaluation.json
Cells = list[tuple[str, ...]]  # of a table, the header first


def read_evaluation(path: epath.Path, notes: list[str]) -> dict[str, Any]:
    """The parts of `evaluation.json` that have the right type; an error becomes a note."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
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


def evaluation_table(evaluation: Entry) -> Cells:
    """The table of an evaluation, or without one its metrics by name; [] without either."""
    metrics = evaluation.get("metrics", {}).items()
    named = [{"metric": name, "after": value} for name, value in metrics]
    entries = evaluation.get("table") or named
    return table_cells(entries) if entries else []


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


def table_cells(entries: Sequence[Entry]) -> Cells:
    """Metric, before, after, change; or of one model, without values before, metric and value."""
    names = [text(entry.get("metric", "")) for entry in entries]
    values = [short(entry.get("after")) + _interval(entry) for entry in entries]
    if entries and all(entry.get("before") is None for entry in entries):
        return [("metric", "value"), *zip(names, values, strict=True)]
    befores = [short(entry.get("before")) for entry in entries]
    changes = []
    for entry in entries:
        before, after = number(entry.get("before")), number(entry.get("after"))
        changes.append("–" if before is None or after is None else change(before, after))
    header = ("metric", "before", "after", "change")
    return [header, *zip(names, befores, values, changes, strict=True)]


def _interval(entry: Entry) -> str:
    """The interval, such as " (0.81 to 0.93)", or nothing."""
    bounds = entry.get("interval")
    if not isinstance(bounds, list) or len(bounds) != 2 or None in map(number, bounds):
        return ""
    return f" ({short(bounds[0])} to {short(bounds[1])})"
