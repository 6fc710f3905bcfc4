"""From single times to what the table shows."""

from typing import Any

import numpy as np

from scripts.benchmark.floor import Phase, floor_seconds
from scripts.benchmark.machine import Machine
from scripts.benchmark.workloads import Workload

Sides = dict[str, dict[str, Any]]


def summarize(
    workload: Workload, sides: Sides, phases: dict[str, list[Phase]], machine: Machine
) -> dict[str, Any]:
    """All numbers of a workload, ready for JSON.

    Args:
      sides: what `take_turns` gives.
      phases: of the step by dtype, as from `phases_of`.
      machine: its measured peaks.

    Returns:
      "workload", "sides" as given and "summary": by side of ours "seconds" (the median),
      "tokens_per_second", "peak_bytes", "flops", "share_of_peak", "floor_seconds",
      "share_of_floor", "compile_seconds", "compilations_after_first_step", and beside TRL
      "times_faster" (the median of the ratios pair by pair), its "least" and "most", and
      "share_of_memory"; of bfloat16 also "times_faster_than_float32" and, where both learn from the
      same tokens, "loss_difference".
    """
    summary: dict[str, dict[str, Any]] = {}
    if "trl" in sides:
        trl = sides["trl"]
        median = float(np.median(trl["seconds"]))
        summary["trl"] = {"seconds": median, "peak_bytes": trl["peak_bytes"]}
    for name, dtype in (("ours", workload.fixed_dtype or "float32"), ("ours_bfloat16", "bfloat16")):
        if name in sides:
            found = _ours(workload, sides[name], phases[dtype], machine, dtype)
            summary[name] = found | _beside(sides[name], sides.get("trl"))
    if "ours_bfloat16" in sides:
        summary["ours_bfloat16"] |= _beside_float32(workload, sides)
    return {
        "workload": workload.name,
        "fixed_dtype": workload.fixed_dtype,
        "to_reach": workload.to_reach,
        "towards": workload.towards,
        "peak_to_reach": workload.peak_to_reach,
        "floor_to_reach": workload.floor_to_reach,
        "tokens": workload.tokens,
        "summary": summary,
        "sides": sides,
    }


def _ours(workload, side, phases, machine, dtype):
    """Of our side alone."""
    seconds = float(np.median(side["seconds"]))
    flops = sum(phase.flops for phase in phases)
    floor = floor_seconds(phases, machine.flops[dtype], machine.bandwidth)
    return {
        "seconds": seconds,
        "tokens_per_second": workload.tokens / seconds,
        "peak_bytes": side["peak_bytes"],
        "flops": flops,
        "share_of_peak": flops / seconds / machine.flops[dtype],
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
        "compile_seconds": side["ready"]["compile_seconds"],
        "compilations_after_first_step": side["compilations_after_first_step"],
    }


def _beside(ours, trl):
    """How we stand to TRL, turn by turn."""
    if trl is None:
        return {}
    ratios = _ratios(trl, ours)
    return {
        "times_faster": float(np.median(ratios)),
        "least": float(min(ratios)),
        "most": float(max(ratios)),
        "share_of_memory": ours["peak_bytes"] / trl["peak_bytes"],
    }


def _beside_float32(workload, sides):
    """What bfloat16 brings, and what it costs: of PPO no loss, whose tokens are other ones."""
    float32, bfloat16 = sides["ours"], sides["ours_bfloat16"]
    found = {"times_faster_than_float32": float(np.median(_ratios(float32, bfloat16)))}
    if workload.kind in ("sft", "reward"):
        pairs = zip(float32["losses"], bfloat16["losses"], strict=True)
        found["loss_difference"] = max(abs(a - b) for a, b in pairs)
    return found


def _ratios(slow, fast):
    return [a / b for a, b in zip(slow["seconds"], fast["seconds"], strict=True)]
