"""The collectives of a compiled program, read off its optimized HLO.

No analysis of the compiler counts them, and the jaxpr has none: XLA's partitioner adds them.
"""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)"
)


class Collective(NamedTuple):
    """One collective of the program.

    Attributes:
      kind: of `KINDS`.
      shape: of its result on one device, as printed, without layouts.
      group: the number of devices that take part together.
      times: how often it runs.
      total: bytes that each device receives in all these runs.
    """

    kind: str
    shape: str
    group: int
    times: int
    total: float


def collectives(text: str, num_devices: int) -> list[Collective]:
    """All collectives among more than one device, in decreasing order of the bytes received.

    Of a result of S bytes among n devices, an all-gather or all-to-all receives S (n - 1) / n, an
    all-reduce twice that, a reduce-scatter S (n - 1), and a permute S: the lower bounds of Chan et
    al. 2007, Collective communication: theory, practice, and experience, section 3.

    Args:
      text: of `compiled.as_text()`.
    """
    computations, entry = _computations(text)
    runs = dict.fromkeys(computations, 0)
    _add_runs(computations, entry, 1, runs)
    found: dict[tuple[str, str], Collective] = {}
    for name, times in runs.items():
        for line in computations[name] if times else ():
            if (collective := _collective(line, name, num_devices, times)) is None:
                continue
            channel = re.search(r"channel_id=\d+", line)
            # A TPU repeats one that overlaps with other work in every fusion that it passes, also
            # inside a loop; it runs as often as where it runs least.
            place = "" if "async_collective_fusion" in line else name
            key = (place, channel[0] if channel else line)
            if key not in found or times < found[key].times:
                found[key] = collective
    among_several = (each for each in found.values() if each.group > 1)
    return sorted(among_several, key=lambda each: -each.total)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(the lines of each computation, the name of the first that runs)."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _add_runs(
    computations: dict[str, list[str]], name: str, times: int, runs: dict[str, int]
) -> None:
    """Adds how often a computation, and each one that it calls, runs; all branches count."""
    runs[name] += times
    for line in computations[name]:
        rounds = times * _trip_count(computations, line) if " while(" in line else times
        for called in _called(line):
            _add_runs(computations, called, rounds, runs)


def _called(line: str) -> list[str]:
    """The computations that an instruction names."""
    names = (one or several for one, several in _CALLED.findall(line))
    return [name.strip(" %") for part in names for name in part.split(",")]


def _trip_count(computations: dict[str, list[str]], line: str) -> int:
    """The number of rounds of a loop, at most.

    A CPU's compiler prints that of a scan. Otherwise it is the greatest integer in the condition;
    the loops that a TPU's compiler makes of products have an unsigned counter, and steps of two.
    """
    if known := re.search(r'known_trip_count":\s*\{"n":\s*"(\d+)"', line):
        return int(known[1])
    (condition,) = re.findall(r"condition=%?([\w.\-]+)", line)
    own = computations[condition]
    called = [x for each in own for name in _called(each) for x in computations[name]]
    signed = re.findall(r"= s\d+\[\]\S* constant\((\d+)\)", "\n".join([*own, *called]))
    unsigned = re.findall(r"= u\d+\[\]\S* constant\((\d+)\)", "\n".join(own))
    return max([1, *map(int, signed), *(int(bound) // 2 for bound in unsigned)])


def _collective(line: str, computation: str, num_devices: int, times: int) -> Collective | None:
    """The collective that an instruction is, if it is one."""
    if (match := _COLLECTIVE.search(line)) is None:
        return None
    shape, kind, start = match.groups()
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)
    if start and kind != "all-reduce":  # the operands stand before the results
        arrays = [each for each in re.findall(r"\w+\[[\d,]*\]", shape) if each != "u32[]"]
        shape = ", ".join(arrays[len(arrays) // 2 :])
    size, group = _array_bytes(shape), _group_size(line, num_devices)
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind, size = "reduce-scatter", size // group
    share = (group - 1) / group
    factors = {"all-reduce": 2 * share, "reduce-scatter": group - 1, "collective-permute": 1}
    return Collective(kind, shape, group, times, times * size * factors.get(kind, share))


def _array_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape.

    >>> _array_bytes("(bf16[2,3], f32[], pred[5])")
    21
    """
    total = 0
    for dtype, axes in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or ["0"])[0])
        total += math.prod(int(size) for size in axes.split(",") if size) * bits // 8
    return total


def _group_size(line: str, num_devices: int) -> int:
    """The number of devices that take part together, in any notation of XLA."""
    if "collective-permute" in line:
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
        return 2 if any(source != target for source, target in pairs) else 1
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(size or sizes[name]) for name, size in parts)
    if counts := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counts[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    return num_devices
