"""What the devices of a compiled program send each other."""

import re
from typing import NamedTuple

from rlhf_jax.runtime.compilation.hlo import Instruction, Module, array_bytes, called, executed

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of the text.

    Attributes:
      kind: of `KINDS`.
      shape: of its result on one device, as printed, without layouts.
      size: bytes of that result.
      group: devices that take part together.
      received: bytes that each device receives, each time it runs.
      times: how often it runs in the program.
      source: the operation that it comes from, as JAX names it.
    """

    kind: str
    shape: str
    size: int
    group: int
    received: float
    times: int
    source: str

    @property
    def total(self) -> float:
        """Bytes received each time that the program runs."""
        return self.received * self.times


def collectives(module: Module, num_devices: int) -> list[Collective]:
    """All collectives among more than one device, those that receive most first.

    Received are, of a result of S bytes among n devices, S (n - 1) / n by an all-gather or
    all-to-all, twice that by an all-reduce, S (n - 1) by a reduce-scatter, and S by a permute: what
    the best algorithms need (Chan et al. 2007, Collective communication: theory, practice, and
    experience, section 3).
    """
    found: dict[tuple[str, str], Collective] = {}
    for instruction, computation, times in executed(module):
        for part, scatters in _parts(module, instruction):
            channel = re.search(r"channel_id=(\d+)", part.rest)
            key = (computation, channel[1] if channel else part.name)
            if "async_collective_fusion" in part.rest:
                # One that a TPU overlaps with other work stands in every fusion that it passes,
                # those of a loop too; it runs as often as the first of them.
                key = ("", key[1])
            if key not in found or times < found[key].times:
                found[key] = _collective(part, scatters, num_devices, times)
    among_many = [each for each in found.values() if each.group > 1]
    return sorted(among_many, key=lambda each: -each.total)


def _parts(module: Module, instruction: Instruction) -> list[tuple[Instruction, bool]]:
    """The collectives that an instruction is or holds, and whether a scatter follows in it."""
    if instruction.opcode.removesuffix("-start") in KINDS:
        return [(instruction, False)]
    if instruction.opcode != "fusion":
        return []
    name = called(instruction, "calls")
    inner = module.computations[name].instructions.values()
    parts = [part for each in inner for part in _parts(module, each)]
    return [(part, "all-reduce-scatter" in name or scatters) for part, scatters in parts]


def _collective(part: Instruction, scatters: bool, num_devices: int, times: int) -> Collective:
    kind, shape = part.opcode.removesuffix("-start"), _result(part)
    size, group = sum(array_bytes(shape)), _group_size(part, num_devices)
    if scatters and kind == "all-reduce":
        kind, size = "reduce-scatter", size // group
    factors = {
        "all-reduce": 2 * (group - 1) / group,
        "reduce-scatter": group - 1,
        "collective-permute": 1,
    }
    received = size * factors.get(kind, (group - 1) / group)
    source = re.search(r'op_name="([^"]*)"', part.rest)
    return Collective(kind, shape, size, group, received, times, source[1] if source else "")


def _result(part: Instruction) -> str:
    """The shape of the result without layouts; what starts one names its operands before it."""
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", part.shape)
    if not part.opcode.endswith("-start") or part.opcode == "all-reduce-start":
        return shape
    arrays = [each for each in re.findall(r"\w+\[[\d,]*\]", shape) if each != "u32[]"]
    return ", ".join(arrays[len(arrays) // 2 :])


def _group_size(part: Instruction, num_devices: int) -> int:
    """How many devices take part together, in any of the forms that XLA prints."""
    if part.opcode.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", part.rest)
        return 2 if any(source != target for source, target in pairs) else 1
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", part.rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        size = 1
        for name, part_size in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2]):
            size *= int(part_size or sizes[name])
        return size
    if counts := re.search(r"replica_groups=\[(\d+),(\d+)\]", part.rest):
        return int(counts[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", part.rest):
        return len(listed[1].split(","))
    return num_devices
