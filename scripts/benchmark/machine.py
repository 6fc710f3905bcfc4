"""The machine: its processor, and its peak rates measured through JAX."""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Keyed by whether JAX runs on a CPU; on an accelerator small products take less time than a launch.
SIZES = {True: (1024, 2048, 4096), False: (4096, 8192, 16384)}
MEMORY = {True: 2**29, False: 2**32}  # bytes, far more than any cache holds
CPUINFO = Path("/proc/cpuinfo")


class Machine(NamedTuple):
    """Measured peak rates of the default device of JAX.

    Attributes:
      flops: FLOP/s of products of square matrices by dtype, the best of several sizes.
      read: bytes/s of summing a large array.
      copy: bytes/s, read and written together, of scaling a large array in place.
    """

    flops: dict[str, float]
    read: float
    copy: float

    @property
    def bandwidth(self) -> float:
        """The larger of both rates, in bytes/s."""
        return max(self.read, self.copy)


def best_of(first: Machine, second: Machine) -> Machine:
    """The larger of each rate: other processes only reduce a measured rate.

    >>> best_of(Machine({"float32": 2.0}, 3.0, 1.0), Machine({"float32": 1.0}, 4.0, 1.0))
    Machine(flops={'float32': 2.0}, read=4.0, copy=1.0)
    """
    flops = {dtype: max(value, second.flops[dtype]) for dtype, value in first.flops.items()}
    return Machine(flops, max(first.read, second.read), max(first.copy, second.copy))


def measure_machine(sizes: Sequence[int] | None = None, memory: int | None = None) -> Machine:
    """Measures matrix products in float32 and bfloat16, and the memory.

    Products have JAX's default precision, which for float32 is TF32 on GPUs that support it.
    """
    is_on_cpu = jax.default_backend() == "cpu"
    sizes, memory = sizes or SIZES[is_on_cpu], memory or MEMORY[is_on_cpu]
    flops = {
        dtype: max(2.0 * size**3 / _product_seconds(size, dtype) for size in sizes)
        for dtype in ("float32", "bfloat16")
    }
    array = jnp.ones(memory // 4, jnp.float32)
    return Machine(
        flops,
        memory / _least_seconds(jax.jit(jnp.sum), array),
        # In place, since the system clears memory that is new to the process.
        2 * memory / _least_seconds(jax.jit(_scale, donate_argnums=0), array, in_place=True),
    )


def hardware() -> dict[str, Any]:
    """The device, processor, vector instructions, cores, memory and system."""
    device = jax.devices()[0]
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": device.platform,
        "processor": _processor(),
        "vector_instructions": vector_instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": memory,
        "system": platform.platform(),
    }


# Those that change the rate of matrix products, as Linux and macOS name them.
VECTOR_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "advsimd",
    "sve",
    "sve2",
    "sme",
)


def vector_instructions() -> str:
    """The vector instructions of the processor, such as "avx2, avx512f"; "unknown" if not known."""
    if sys.platform == "darwin":
        flags = _sysctl_flags()
    else:
        flags = _cpuinfo("flags") or _cpuinfo("Features")  # x86 or Arm
    supported = [name for name in VECTOR_INSTRUCTIONS if name in flags.lower().split()]
    return ", ".join(supported) or "unknown"


def _sysctl_flags() -> str:
    """The features that macOS reports as 1, such as "avx2_0" for AVX2 and "arm.FEAT_SME"."""
    try:
        done = subprocess.run(["sysctl", "hw.optional"], capture_output=True, text=True)
    except OSError:
        return ""
    supported = re.findall(r"^hw\.optional\.(?:arm\.)?(?:FEAT_)?(\w+): 1$", done.stdout, re.M)
    return " ".join(name.removesuffix("_0") for name in supported)


def busy_cores(seconds: float = 1.0) -> float | None:
    """The number of cores that other processes keep busy; None if the system does not report it."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None:
        return None
    spent = [b - a for a, b in zip(before, after, strict=True)]
    idle = spent[3] + spent[4]  # idle, and waiting for a disk
    return (os.cpu_count() or 1) * (1.0 - idle / max(sum(spent), 1))


def _ticks() -> list[int] | None:
    """The time of all cores together: user, nice, system, idle, iowait, ..."""
    try:
        with open("/proc/stat") as file:
            return [int(number) for number in file.readline().split()[1:9]]
    except OSError:
        return None


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """The first value of a key in /proc/cpuinfo; "" if there is none."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return ""
    match = re.search(rf"^{key}\s*:(.*)$", text, re.M)
    return match.group(1).strip() if match else ""


def _product_seconds(size: int, dtype: str) -> float:
    # Random numbers: a GPU multiplies constants faster, since they take less power.
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    return _least_seconds(jax.jit(jnp.matmul), x, x)


def _scale(x):
    return x * 1.5


def _least_seconds(
    function: Callable[..., jax.Array], *arguments: jax.Array, in_place: bool = False
) -> float:
    """The shortest of seven runs, or of fewer that take three seconds together.

    With `in_place` the function takes one array, which it donates: each run takes the result of
    the run before.
    """
    result = jax.block_until_ready(function(*arguments))
    times: list[float] = []
    while len(times) < 7 and sum(times) < 3.0:
        inputs = (result,) if in_place else arguments
        started = time.perf_counter()
        result = jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - started)
    return min(times)
