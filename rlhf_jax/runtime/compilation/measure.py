"""What a program costs, by its compiled form."""

import re
from typing import Any, NamedTuple

import jax

from rlhf_jax.runtime.compilation import hlo
from rlhf_jax.runtime.compilation.ahead import Program
from rlhf_jax.runtime.compilation.chips import Chip, Roofline, roofline
from rlhf_jax.runtime.compilation.collectives import Collective, collectives
from rlhf_jax.runtime.compilation.flops import count_flops
from rlhf_jax.runtime.compilation.topologies import quiet
from rlhf_jax.runtime.compilation.traffic import bytes_moved


class Cost(NamedTuple):
    """What one run of a program costs each device.

    Attributes:
      name: of the program.
      arguments, outputs, donated, temporaries, peak: bytes, by the compiler: of all arguments, of
        all results, of the arguments whose memory the results take over, of all that is made on
        the way, and the most that is held at any time, arguments included.
      unread: bytes of the state that the program does not read, and that stay where they are.
      flops: of products, all devices together, over their number.
      moved: bytes read and written in the device's memory.
      collectives: those that receive most first.
      warnings: the compiler's, of what it could not split well.
    """

    name: str
    arguments: int
    outputs: int
    donated: int
    temporaries: int
    peak: int
    unread: int
    flops: float
    moved: int
    collectives: list[Collective]
    warnings: list[str]

    @property
    def received(self) -> float:
        """Bytes that the device receives from others."""
        return sum(each.total for each in self.collectives)

    def roofline(self, chip: Chip) -> Roofline:
        """The least time that a run can take."""
        return roofline(chip, flops=self.flops, moved=self.moved, received=self.received)


class TooLarge(NamedTuple):
    """A program that the compiler found no room for: what it needs of what there is, in its words.

    FLOPs are known all the same, since they come from the trace.
    """

    name: str
    needed: str
    available: str
    flops: float


def measure(program: Program, num_devices: int) -> Cost | TooLarge:
    """Compiles a program and reads its cost off the result. Under `jax.set_mesh` of its mesh."""
    traced = program.function.trace(*program.arguments)
    flops = count_flops(traced.jaxpr) / num_devices
    try:
        with quiet() as said:
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = _too_large(str(error))
        if sizes is None:
            raise
        return TooLarge(program.name, *sizes, flops)
    module, memory = hlo.parse(compiled.as_text()), compiled.memory_analysis()
    return Cost(
        program.name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        _peak(memory),
        max(0, program.state_bytes - memory.argument_size_in_bytes),
        flops,
        bytes_moved(module),
        collectives(module, num_devices),
        _warnings(said),
    )


def _peak(memory: Any) -> int:
    """The most that is held at any time, as the compiler for TPUs tells; else all parts together.

    There temporaries that take turns in one place are counted each.
    """
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes
    total += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    device = jax.sharding.get_mesh().devices.flat[0]
    return memory.peak_memory_in_bytes if device.platform == "tpu" else total


def _warnings(lines: list[str]) -> list[str]:
    """What the compiler says of arrays that it first copies to all devices, each once."""
    found = (re.search(r"(Involuntary full rematerialization.*?)(\. As the|$)", x) for x in lines)
    return list(dict.fromkeys(match[1] for match in found if match))


def _too_large(message: str) -> tuple[str, str] | None:
    """(needed, available) of XLA's message that the memory does not suffice; None of another."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    forms = (
        r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)",
        r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?)",
        r"total memory required[^.]*?([\d.]+[KMGT])\b.*?available[^.]*?([\d.]+[KMGT])\b",
    )
    found = next((match for form in forms if (match := re.search(form, message))), None)
    return (found[1], found[2]) if found else ("more", "there is")
