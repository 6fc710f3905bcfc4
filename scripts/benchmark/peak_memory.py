"""The most memory that this process, or its device, has held."""

import resource
import sys
from typing import Any

import jax

STATUS, RESET = "/proc/self/status", "/proc/self/clear_refs"


def peak_bytes(was_reset: bool) -> dict[str, Any]:
    """{"peak_bytes", "peak_of"}: of the first device, or on the CPU of this process.

    "peak_of" says what was measured: "device" and "process" since its start, "steps" since
    `reset_peak`. Memory of a process is what it had resident, the code of its libraries included.

    Args:
      was_reset: what `reset_peak` gave.
    """
    stats = None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"peak_bytes": stats["peak_bytes_in_use"], "peak_of": "device"}
    try:
        with open(STATUS) as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        # In bytes on macOS alone.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_bytes": peak, "peak_of": "steps" if was_reset else "process"}


def reset_peak() -> bool:
    """Forgets the peak of the process until now; False where the system cannot.

    That of a device stays.
    """
    try:
        with open(RESET, "w") as file:
            file.write("5")
    except OSError:
        return False
    return True
