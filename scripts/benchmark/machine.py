"""What this machine can do, measured through JAX in the same run as the workloads."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# By whether JAX computes on a CPU. What is small ends on an accelerator before it is started.
SIZES = {True: (1024, 2048, 4096), False: (4096, 8192, 16384)}
MEMORY = {True: 2**29, False: 2**32}  # bytes, far more than any cache holds


class Machine(NamedTuple):
    """Measured peaks of the devices that JAX computes on by default.

    Attributes:
      flops: FLOP/s of products of square matrices, by dtype, the best of several sizes.
      read: bytes/s of summing a large array.
      copy: bytes/s, read and written together, of scaling one in its own memory.
    """

    flops: dict[str, float]
    read: float
    copy: float

    @property
    def bandwidth(self) -> float:
        """Bytes/s at most, of either way."""
        return max(self.read, self.copy)


def best_of(first: Machine, second: Machine) -> Machine:
    """The larger of each number: what else runs on a machine makes it look smaller, never larger.

    >>> best_of(Machine({"float32": 2.0}, 3.0, 1.0), Machine({"float32": 1.0}, 4.0, 1.0))
    Machine(flops={'float32': 2.0}, read=4.0, copy=1.0)
    """
    flops = {dtype: max(value, second.flops[dtype]) for dtype, value in first.flops.items()}
    return Machine(flops, max(first.read, second.read), max(first.copy, second.copy))


def measure_machine(sizes: Sequence[int] | None = None, memory: int | None = None) -> Machine:
    """Measures products in float32 and bfloat16 as JAX multiplies by default, and the memory.

    That is TF32 on a GPU which has it.
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
        # Memory that is new to the process would be cleared by the system meanwhile.
        2 * memory / _least_seconds(jax.jit(_scale, donate_argnums=0), array, in_place=True),
    )


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    device = jax.devices()[0]
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": device.platform,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": memory,
        "system": platform.platform(),
    }


def busy_cores(seconds: float = 1.0) -> float | None:
    """How many cores others keep busy, while this waits; None where the system does not tell."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None:
        return None
    spent = [b - a for a, b in zip(before, after, strict=True)]
    idle = spent[3] + spent[4]  # and waiting for a disk
    return (os.cpu_count() or 1) * (1.0 - idle / max(sum(spent), 1))


def _ticks() -> list[int] | None:
    """What all cores together have spent, by kind: user, nice, system, idle, iowait, ..."""
    try:
        with open("/proc/stat") as file:
            return [int(number) for number in file.readline().split()[1:9]]
    except OSError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            line = next(line for line in file if line.startswith("model name"))
        return line.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _product_seconds(size: int, dtype: str) -> float:
    # A GPU multiplies ones faster, which take less power.
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    return _least_seconds(jax.jit(jnp.matmul), x, x)


def _scale(x):
    return x * 1.5


def _least_seconds(
    function: Callable[..., jax.Array], *arguments: jax.Array, in_place: bool = False
) -> float:
    """The shortest of seven runs; of as many as take three seconds, where they are long.

    With `in_place` the function takes one array, whose memory it may reuse: it is given its own
    result in the next run.
    """
    result = jax.block_until_ready(function(*arguments))
    times: list[float] = []
    while len(times) < 7 and sum(times) < 3.0:
        given = (result,) if in_place else arguments
        started = time.perf_counter()
        result = jax.block_until_ready(function(*given))
        times.append(time.perf_counter() - started)
    return min(times)
