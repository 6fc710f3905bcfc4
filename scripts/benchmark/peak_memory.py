"""The peak memory of this process, or of its device."""

import resource
import sys
from typing import Any

import jax

STATUS, RESET = "/proc/self/status", "/proc/self/clear_refs"


def peak_bytes(was_reset: bool) -> dict[str, Any]:
    """{"peak_bytes", "peak_of"} of the first device, or of this process if JAX runs on the CPU.

    "peak_of" is "device" or "process" for a peak since the start of the process, and "steps" for
    one since `reset_peak`. Process memory is resident memory, including the code of libraries.

    Args:
      was_reset: the result of `reset_peak`.
    """
    stats = None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"peak_bytes": stats["peak_bytes_in_use"], "peak_of": "device"}
    try:
        with open(STATUS) as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        # Bytes on macOS, KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_bytes": peak, "peak_of": "steps" if was_reset else "process"}


def reset_peak() -> bool:
    """Resets the peak memory of the process; False if the system cannot.

    The peak of a device is not reset.
    """
    try:
        with open(RESET, "w") as file:
            file.write("5")
    except OSError:
        return False
    return True
