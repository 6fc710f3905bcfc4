"""The output of the command: Markdown tables, and notes on the measurement."""

from collections.abc import Iterable, Sequence, Set
from typing import Any

_MIB = 2**20
_PEER_COLUMNS = {
    "TRL, s",
    "times faster",
    "to reach",
    "towards",
    "TRL, MiB",
    "of TRL's memory",
    "faster than TRL",
}


def as_text(result: dict[str, Any]) -> str:
    """The tables and notes of the numbers in the JSON file."""
    workloads = result["workloads"]
    without = set() if _has_peer(result) else _PEER_COLUMNS
    parts = [_table((_float32_columns(each) for each in workloads), without)]
    if any("ours_bfloat16" in each["summary"] for each in workloads):
        columns = (_bfloat16_columns(each) for each in workloads)
        parts.append("In bfloat16:\n\n" + _table(columns, without))
    targets = [each for each in workloads if _has_target(each)]
    if targets:
        columns = (_target_columns(each) for each in targets)
        parts.append("Beside the limits of the device:\n\n" + _table(columns, set()))
    parts.append("\n".join(_foot(result)))
    return "\n\n".join(parts)


def _has_peer(result: dict[str, Any]) -> bool:
    return result["peer"]["name"] != "none"


def _float32_columns(workload: dict[str, Any]) -> dict[str, str]:
    summary = workload["summary"]
    ours, trl = summary["ours"], summary.get("trl", {})
    return {
        "workload": workload["workload"],
        "TRL, s": _number(trl.get("seconds"), ".3f"),
        "ours, s": _number(ours["seconds"], ".3f"),
        "times faster": _ratio(ours),
        "to reach": _number(workload["to_reach"], "g"),
        "towards": _number(workload["towards"], "g"),
        "tokens/s": _number(ours["tokens_per_second"], ",.0f"),
        "TRL, MiB": _mib(trl),
        **_costs(ours),
    }


def _bfloat16_columns(workload: dict[str, Any]) -> dict[str, str]:
    ours = workload["summary"]["ours_bfloat16"]
    return {
        "workload": workload["workload"],
        "ours, s": _number(ours["seconds"], ".3f"),
        "faster than float32": _number(ours["times_faster_than_float32"], ".2f"),
        "faster than TRL": _ratio(ours),
        "tokens/s": _number(ours["tokens_per_second"], ",.0f"),
        **_costs(ours),
        "loss differs by": _number(ours.get("loss_difference"), ".1e"),
    }


def _costs(ours: dict[str, Any]) -> dict[str, str]:
    """The columns that follow the times in both tables."""
    return {
        "ours, MiB": _mib(ours),
        "of TRL's memory": _number(ours.get("share_of_memory"), ".0%"),
        "of the peak": _number(ours["share_of_peak"], ".0%"),
        "floor, s": _number(ours["floor_seconds"], ".3f"),
        "compile, s": _number(ours["compile_seconds"], ".1f"),
        "compiled later": _number(ours["compilations_after_first_step"], "d"),
    }


def _has_target(workload: dict[str, Any]) -> bool:
    return workload["peak_to_reach"] is not None or workload["floor_to_reach"] is not None


def _target_columns(workload: dict[str, Any]) -> dict[str, str]:
    ours = workload["summary"]["ours"]
    return {
        "workload": workload["workload"],
        "of the peak": _number(ours["share_of_peak"], ".0%"),
        "peak to reach": _number(workload["peak_to_reach"], ".0%"),
        "of the floor": _number(ours["share_of_floor"], ".0%"),
        "floor to reach": _number(workload["floor_to_reach"], ".0%"),
    }


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _ratio(ours: dict[str, Any]) -> str:
    if "times_faster" not in ours:
        return "-"
    return f"{ours['times_faster']:.2f} ({ours['least']:.2f} to {ours['most']:.2f})"


def _mib(side: dict[str, Any]) -> str:
    return _number(side["peak_bytes"] / _MIB, ".0f") if side else "-"


def _table(columns: Iterable[dict[str, str]], without: Set[str]) -> str:
    """An aligned Markdown table of dicts with the same keys, without some columns."""
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
        f"{result['date']}, {_machine(hardware)}. {versions}.",
        f"Measured here: products in {flops}; memory {machine['read'] / 1e9:,.1f} GB/s read, "
        f"{machine['copy'] / 1e9:,.1f} GB/s read and written.",
        _turns(result),
        _memory(result),
        _checks(result["checks"]),
    ]
    if result["attention"] is not None:
        worst = max(result["attention"]["loss"], result["attention"]["gradients"])
        lines.append(f"cuDNN's attention differs from ours in bfloat16 by at most {worst:.1e}.")
    in_bfloat16 = [each["workload"] for each in result["workloads"] if each["fixed_dtype"]]
    if in_bfloat16:
        lines.insert(2, f"In bfloat16 on all sides: {', '.join(in_bfloat16)}.")
    if None not in result["busy_cores"]:
        before, after = result["busy_cores"]
        load = f"Other processes kept {before:.1f} cores busy before and {after:.1f} after"
        effect = ", which slows PyTorch's threads down more than ours"
        lines.append(f"{load}{effect if _has_peer(result) else ''}.")
    if result["model_path"] is not None:
        lines.append(f"Weights of SmolLM2: {result['model_path']}.")
    if _has_peer(result):
        scope = " elsewhere" if in_bfloat16 else ""
        lines.insert(3, f"TRL computes in {result['peer']['dtype']}{scope}.")
    return lines


def _machine(hardware: dict[str, Any]) -> str:
    """The GPU or TPU if there is one, and the processor with its vector instructions."""
    processor = (
        f"{hardware['processor']} ({hardware['vector_instructions']}), {hardware['cores']} cores"
    )
    return processor if hardware["platform"] == "cpu" else f"{hardware['device']}; {processor}"


def _turns(result: dict[str, Any]) -> str:
    medians = f"Medians of {result['rounds']} turns"
    if not _has_peer(result):
        return f"{medians}."
    if not result["alternate"]:
        return f"{medians}, one side after the other; ratios turn by turn, the least and the most."
    return f"{medians}, taken alternately; ratios turn by turn, with the least and the most."


_PEAKS = {
    "steps": "of the process during the turns, with its libraries",
    "process": "of the process since its start, since this system cannot reset it",
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
    count = "one step" if len(checks) == 1 else f"{len(checks)} steps"
    return (
        f"Checked against the plain path: losses, gradients and samples of {count} differ by at "
        f"most {worst:.1e}."
    )
