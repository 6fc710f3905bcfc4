"""The numbers of the table from the measured times."""

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
      sides: as from `take_turns`.
      phases: of the step by dtype, as from `phases_of`.
      machine: its measured peak rates.

    Returns:
      "workload", its targets, "tokens", "sides" unchanged, and "summary": for each side of this
      library "seconds" (the median), "tokens_per_second", "peak_bytes", "flops", "share_of_peak",
      "floor_seconds", "share_of_floor", "compile_seconds" and "compilations_after_first_step";
      beside TRL also "times_faster" (the median of the ratios of the turns), its "least" and
      "most", and "share_of_memory"; in bfloat16 also "times_faster_than_float32" and, for sft and
      reward, "loss_difference".
    """
    summary: dict[str, dict[str, Any]] = {}
    if "trl" in sides:
        trl = sides["trl"]
        median = float(np.median(trl["seconds"]))
        summary["trl"] = {"seconds": median, "peak_bytes": trl["peak_bytes"]}
    for name, dtype in (("ours", workload.fixed_dtype or "float32"), ("ours_bfloat16", "bfloat16")):
        if name in sides:
            alone = _summary(workload, sides[name], phases[dtype], machine, dtype)
            summary[name] = alone | _ratios_to_trl(sides[name], sides.get("trl"))
    if "ours_bfloat16" in sides:
        summary["ours_bfloat16"] |= _comparison_with_float32(workload, sides)
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


def _summary(workload, side, phases, machine, dtype):
    """The numbers of one side of this library."""
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


def _ratios_to_trl(ours, trl):
    """Time and memory relative to TRL; empty without TRL."""
    if trl is None:
        return {}
    ratios = _ratios(trl, ours)
    return {
        "times_faster": float(np.median(ratios)),
        "least": float(min(ratios)),
        "most": float(max(ratios)),
        "share_of_memory": ours["peak_bytes"] / trl["peak_bytes"],
    }


def _comparison_with_float32(workload, sides):
    """Speed and loss of bfloat16 beside float32; no loss of PPO, which samples other tokens."""
    float32, bfloat16 = sides["ours"], sides["ours_bfloat16"]
    comparison = {"times_faster_than_float32": float(np.median(_ratios(float32, bfloat16)))}
    if workload.kind in ("sft", "reward"):
        pairs = zip(float32["losses"], bfloat16["losses"], strict=True)
        comparison["loss_difference"] = max(abs(a - b) for a, b in pairs)
    return comparison


def _ratios(slow, fast):
    return [a / b for a, b in zip(slow["seconds"], fast["seconds"], strict=True)]
