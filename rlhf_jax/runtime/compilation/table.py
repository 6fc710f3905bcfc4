"""The cost of a stage as text for a terminal."""

from typing import Any

from rlhf_jax.runtime.compilation.collectives import KINDS
from rlhf_jax.runtime.compilation.cost import OF_CONFIGURATION

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def as_text(numbers: dict[str, Any]) -> str:
    """The numbers of `stage_cost`."""
    mesh = " x ".join(f"{name} {size}" for name, size in numbers["mesh"].items())
    model = "" if numbers["model"] == OF_CONFIGURATION else f" of {numbers['model']}"
    lines = [
        f"{numbers['stage']}{model} ({numbers['parameters']:.4g} parameters, "
        f"{numbers['dtype']}) on {numbers['topology']}: {numbers['devices']} devices "
        f"({numbers['device_kind']}), mesh {mesh}",
        "Compiled, not run. All numbers are of one device.",
    ]
    for program in numbers["programs"]:
        lines += ["", *_program_lines(program, numbers["chip"])]
    return "\n".join(lines)


def _program_lines(program: dict[str, Any], chip: dict[str, Any] | None) -> list[str]:
    flops = f"  FLOPs of products   {program['flops']:.4g}"
    if "needed" in program:
        needed = f"needs {program['needed']} bytes of memory, and has {program['available']}"
        return [f"{program['name']}: does not fit. The compiler {needed}.", flops]
    fits = "fits." if program["fits"] else "does not fit beside the state."
    beside = f", beside {_gib(program['unread'])} of state" if program["unread"] else ""
    lines = [
        f"{program['name']}: {fits}" if chip else f"{program['name']}:",
        f"  state and batch     {_gib(program['arguments'])}",
        f"  held at most        {_gib(program['peak'])}"
        + (f" of {_gib(chip['hbm'])}{beside}" if chip else beside),
        flops,
        f"  memory, at least    {program['moved'] / 1e9:.4g} GB read or written",
        f"  received            {program['received'] / 1e9:.4g} GB",
        *(_collectives_line(kind, program["collectives"]) for kind in KINDS),
        *(f"  {warning}" for warning in program["warnings"][:3]),
    ]
    if seconds := program.get("seconds"):
        bound = max(seconds, key=seconds.__getitem__)
        parts = ", ".join(f"{name} {value:.4g} s" for name, value in seconds.items())
        lines.append(f"  at least {seconds[bound]:.4g} s, bound by {bound} ({parts})")
    return [line for line in lines if line]


def _collectives_line(kind: str, found: list[dict[str, Any]]) -> str:
    """The number and bytes of the collectives of a kind, and the largest; "" without any."""
    found = [each for each in found if each["kind"] == kind]
    if not found:
        return ""
    count, total = sum(each["times"] for each in found), sum(each["total"] for each in found)
    largest = f"{found[0]['shape'][:50]} among {found[0]['group']}, {found[0]['times']} times"
    return f"    {kind:<20}{count:>7} times {total / 1e9:>9.4g} GB; the largest: {largest}"


def _gib(size: float) -> str:
    """A number of bytes in powers of 1024."""
    unit = next((unit for unit in ("GiB", "MiB") if size >= _UNITS[unit]), "KiB")
    return f"{size / _UNITS[unit]:.3g} {unit}"
