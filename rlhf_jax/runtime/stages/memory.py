"""The memory that a run needs, estimated before its first step."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax.runtime.program import Placement, held_bytes

CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")

logger = logging.getLogger("rlhf_jax.runtime.stages")


class Memory(NamedTuple):
    """Bytes of a run on each device; on CPUs, which share it, of all devices of this process.

    Attributes:
      weights: trained parameters.
      frozen: other parameters: frozen layers, the reference, reward models.
      moments: the state of the optimizer.
      step: all else that a step holds at one time: gradients, activations, batch, results.
      rest: the process apart from its state, where devices are CPUs.
      available: None where it is not known.
    """

    weights: int
    frozen: int
    moments: int
    step: int
    rest: int
    available: int | None

    @property
    def total(self) -> int:
        """The bytes needed."""
        return self.weights + self.frozen + self.moments + self.step + self.rest


def estimate(
    place: Placement, state: Any, programs: Sequence[tuple[Any, tuple[Any, ...]]]
) -> Memory:
    """The memory of a state and of the programs of a step, which are compiled for it.

    Calls with arguments of the same shapes do not compile them again.

    Args:
      programs: (jitted function, its arguments, of which shapes are enough) each.
    """
    device, resident = place.mesh.devices.flat[0], _resident_bytes()
    parts = state._asdict()
    held_parts = (("params",), ("frozen", "reference"), ("opt_state",))
    sizes = [place.bytes_on_device([parts.get(name) for name in names]) for names in held_parts]
    of_state = place.bytes_on_device(state)
    held = [
        held_bytes(memory, of_state, device.platform)
        for function, arguments in programs
        if (memory := function.lower(*arguments).compile().memory_analysis()) is not None
    ]
    sizes.append(max([of_state, *held]) - sum(sizes))
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return Memory._make([*sizes, 0, stats.get("bytes_limit")])
    count = len(place.mesh.local_devices)
    rest = max(0, resident - count * of_state)
    return Memory._make([*(count * size for size in sizes), rest, _host_bytes()])


def check(name: str, memory: Memory) -> None:
    """Logs a warning if the memory needed is more than there is."""
    if memory.available is not None and memory.total > memory.available:
        logger.warning(
            "A step of %s needs some %s GiB of memory, and there are %s: see the page on memory "
            "for what lowers it, such as a smaller %s.batch_size or more %s."
            "gradient_accumulation_steps.",
            name,
            _number(memory.total),
            _number(memory.available),
            name,
            name,
        )


def as_line(name: str, memory: Memory, num_devices: int = 1) -> str:
    """The estimate in GiB, for a terminal.

    >>> as_line("sft", Memory(2**29, 0, 2**30, 2**28, 0, 80 * 2**30))
    'sft: memory 1.8/80 GiB: weights 0.5 moments 1.0 step 0.2'
    """
    parts = {
        each: getattr(memory, each) for each in ("weights", "frozen", "moments", "step", "rest")
    }
    shown = " ".join(f"{part} {_number(size)}" for part, size in parts.items() if size)
    of = "" if memory.available is None else f"/{_number(memory.available)}"
    each = " a device" if num_devices > 1 else ""
    return f"{name}: memory {_number(memory.total)}{of} GiB{each}: {shown}"


def _number(size: float) -> str:
    """Bytes in GiB, short: 0.02, 0.5, 1.5, 61."""
    size /= 2**30
    if size < 0.95:
        return f"{round(size, 2):.1g}"
    return f"{size:.1f}" if size < 9.95 else f"{size:.0f}"


def _resident_bytes() -> int:
    """Memory of this process; 0 where it is not known."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _host_bytes() -> int | None:
    """Memory of the host, or of the container if that has less; None where it is not known."""
    known = []
    if "SC_PHYS_PAGES" in os.sysconf_names:
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if CGROUP.is_file() and (limit := CGROUP.read_text().strip()).isdigit():
        known.append(int(limit))
    return min(known, default=None)
