"""What the command prints: Markdown tables, and what one has to know to read them."""

from collections.abc import Iterable, Sequence, Set
from typing import Any

_MIB = 2**20
_OF_THE_PEER = {
    "TRL, s",
    "times faster",
    "to reach",
    "towards",
    "TRL, MiB",
    "of TRL's memory",
    "faster than TRL",
}


def as_text(result: dict[str, Any]) -> str:
    """The tables and their foot, of what `benchmark.json` holds."""
    workloads = result["workloads"]
    without = set() if _has_peer(result) else _OF_THE_PEER
    parts = [_table((_float32_columns(each) for each in workloads), without)]
    if any("ours_bfloat16" in each["summary"] for each in workloads):
        columns = (_bfloat16_columns(each) for each in workloads)
        parts.append("In bfloat16:\n\n" + _table(columns, without))
    targets = [each for each in workloads if _has_target(each)]
    if targets:
        columns = (_target_columns(each) for each in targets)
        parts.append("How near to what the device can do:\n\n" + _table(columns, set()))
    parts.append("\n".join(_foot(result)))
    return "\n\n".join(parts)


def _has_peer(result: dict[str, Any]) -> bool:
    return result["peer"]["name"] != "none"


def _float32_columns(found: dict[str, Any]) -> dict[str, str]:
    summary = found["summary"]
    ours, trl = summary["ours"], summary.get("trl", {})
    return {
        "workload": found["workload"],
        "TRL, s": _number(trl.get("seconds"), ".3f"),
        "ours, s": _number(ours["seconds"], ".3f"),
        "times faster": _ratio(ours),
        "to reach": _number(found["to_reach"], "g"),
        "towards": _number(found["towards"], "g"),
        "tokens/s": _number(ours["tokens_per_second"], ",.0f"),
        "TRL, MiB": _mib(trl),
        **_costs(ours),
    }


def _bfloat16_columns(found: dict[str, Any]) -> dict[str, str]:
    ours = found["summary"]["ours_bfloat16"]
    return {
        "workload": found["workload"],
        "ours, s": _number(ours["seconds"], ".3f"),
        "faster than float32": _number(ours["times_faster_than_float32"], ".2f"),
        "faster than TRL": _ratio(ours),
        "tokens/s": _number(ours["tokens_per_second"], ",.0f"),
        **_costs(ours),
        "loss differs by": _number(ours.get("loss_difference"), ".1e"),
    }


def _costs(ours: dict[str, Any]) -> dict[str, str]:
    """What a step of ours takes but for its time, in both tables."""
    return {
        "ours, MiB": _mib(ours),
        "of TRL's memory": _number(ours.get("share_of_memory"), ".0%"),
        "of the peak": _number(ours["share_of_peak"], ".0%"),
        "floor, s": _number(ours["floor_seconds"], ".3f"),
        "compile, s": _number(ours["compile_seconds"], ".1f"),
        "compiled later": _number(ours["compilations_after_first_step"], "d"),
    }


def _has_target(found: dict[str, Any]) -> bool:
    return found["peak_to_reach"] is not None or found["floor_to_reach"] is not None


def _target_columns(found: dict[str, Any]) -> dict[str, str]:
    ours = found["summary"]["ours"]
    return {
        "workload": found["workload"],
        "of the peak": _number(ours["share_of_peak"], ".0%"),
        "peak to reach": _number(found["peak_to_reach"], ".0%"),
        "of the floor": _number(ours["share_of_floor"], ".0%"),
        "floor to reach": _number(found["floor_to_reach"], ".0%"),
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(ours: dict[str, Any]) -> str:
    if "times_faster" not in ours:
        return "-"
    return f"{ours['times_faster']:.2f} ({ours['least']:.2f} to {ours['most']:.2f})"


def _mib(side: dict[str, Any]) -> str:
    return _number(side["peak_bytes"] / _MIB, ".0f") if side else "-"


def _table(columns: Iterable[dict[str, str]], without: Set[str]) -> str:
    """Rows of the same keys as an aligned table: the first column to the left."""
    rows = [{key: row[key] for key in row if key not in without} for row in columns]
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    header, *body = (_line(line, widths) for line in lines)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([header, _line(rule, widths), *body])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "| " + " | ".join(padded) + " |"


def _foot(result: dict[str, Any]) -> list[str]:
    machine, hardware = result["machine"], result["hardware"]
    versions = ", ".join(f"{name} {text}" for name, text in result["versions"].items())
    flops = ", ".join(
        f"{dtype} {value / 1e9:,.0f} GFLOP/s" for dtype, value in machine["flops"].items()
    )
    lines = [
        f"{result['date']}, {hardware['device']}, {hardware['cores']} cores. {versions}.",
        f"Measured here: products in {flops}; memory {machine['read'] / 1e9:,.1f} GB/s read, "
        f"{machine['copy'] / 1e9:,.1f} GB/s read and written.",
        _turns(result),
        _memory(result),
        _checks(result["checks"]),
    ]
    if result["attention"] is not None:
        worst = max(result["attention"]["loss"], result["attention"]["gradients"])
        lines.append(f"cuDNN's attention differs from ours in bfloat16 by {worst:.1e} at most.")
    in_half = [each["workload"] for each in result["workloads"] if each["fixed_dtype"]]
    if in_half:
        lines.insert(2, f"In bfloat16 on all sides: {', '.join(in_half)}.")
    if None not in result["busy_cores"]:
        before, after = result["busy_cores"]
        others = f"Others kept {before:.1f} cores busy before and {after:.1f} after"
        why = ": with more than none, PyTorch's threads lose far more than ours"
        lines.append(f"{others}{why if _has_peer(result) else ''}.")
    if _has_peer(result):
        others = " elsewhere" if in_half else ""
        lines.insert(3, f"TRL computes in {result['peer']['dtype']}{others}.")
    return lines


def _turns(result: dict[str, Any]) -> str:
    medians = f"Medians of {result['rounds']} turns"
    if not _has_peer(result):
        return f"{medians}."
    if not result["alternate"]:
        return f"{medians}, one side after the other; ratios turn by turn, the least and the most."
    return f"{medians}, taken alternately; ratios turn by turn, with the least and the most."


_PEAKS = {
    "steps": "of the process during the turns, its libraries included",
    "process": "of the process since its start, since this system forgets no peak",
    "device": "of the device's memory; ours since the start",
}


def _memory(result: dict[str, Any]) -> str:
    sides = (side for each in result["workloads"] for side in each["sides"].values())
    kinds = dict.fromkeys(side.get("peak_of", "process") for side in sides)
    return f"Memory: the peak {'; or '.join(_PEAKS[kind] for kind in kinds)}."


def _checks(checks: list[dict[str, Any]] | None) -> str:
    if checks is None:
        return "Not checked against the plain path."
    worst = max(max(each["loss"], each["gradients"]) for each in checks)
    forms = "one form" if len(checks) == 1 else f"{len(checks)} forms"
    return (
        f"Checked against the plain path: losses, gradients and samples of {forms} differ by "
        f"{worst:.1e} at most."
    )
