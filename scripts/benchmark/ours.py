"""One workload in this library, as a process, so that its peak memory is that of the workload.

    python -m scripts.benchmark.ours REQUEST.json ARRAYS.npz

It writes `{"ready": true, ...}` when the step is compiled, and then follows the protocol of
`trl_worker.py`: the line "step" on standard input runs a step and writes {"seconds": ..., "loss":
...}, "reset" resets the peak memory, and "stop" ends the process with {"peak_bytes": ..., ...}.
"""

import json
import os
import sys
import time
from typing import Any

import jax
import numpy as np

from rlhf_jax.backend import trim_heap
from scripts.benchmark.peak_memory import peak_bytes, reset_peak
from scripts.benchmark.programs import Program, make_program
from scripts.benchmark.workloads import read_request

COMPILED = "/jax/core/compile/backend_compile_duration"


def main() -> None:
    """Compiles the workload, and answers on standard output until the line "stop"."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # A cached program would make the compile time 0.
    jax.config.update("jax_enable_compilation_cache", False)
    with open(sys.argv[1]) as file:
        workload, dtype = read_request(json.load(file))
    worker = Worker(make_program(workload, dict(np.load(sys.argv[2])), dtype))
    print(json.dumps({"ready": True, **worker.compile()}), file=answers)
    while (line := sys.stdin.readline().strip()) in ("step", "reset"):
        if line == "reset":
            trim_heap()  # as in the commands after the first step
            worker.was_reset = reset_peak()
        else:
            print(json.dumps(worker.step()), file=answers)
    print(json.dumps(worker.stop()), file=answers)


class Worker:
    """A program with its state.

    Args:
      program: the workload; its state is initialised here.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.key = program, jax.random.key(0)
        init = jax.jit(program.init) if program.is_pure else program.init
        self.state = jax.block_until_ready(init(self.key))
        jax.clear_caches()  # a run restores a checkpoint instead of running this program
        self.compiled: Any = None
        self.steps = self.compilations = 0
        self.was_reset = False
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **others: Any) -> None:
        # Compilations before the end of the first step are expected.
        self.compilations += event == COMPILED and self.steps > 0

    def compile(self) -> dict[str, Any]:
        """Seconds of lowering and compiling, and the bytes of arguments and temporaries."""
        started = time.perf_counter()
        lowered = self.program.jitted.lower(self.state, self.program.batch, self.key)
        self.compiled = lowered.compile()
        seconds, memory = time.perf_counter() - started, self.compiled.memory_analysis()
        return {
            "compile_seconds": seconds,
            "argument_bytes": memory and memory.argument_size_in_bytes,
            "temporary_bytes": memory and memory.temp_size_in_bytes,
            "versions": {"jax": jax.__version__, "numpy": np.__version__},
        }

    def step(self) -> dict[str, Any]:
        """Runs a step: {"seconds", "loss"}, from the batch on the host to results on the device."""
        started = time.perf_counter()
        key = jax.random.fold_in(self.key, self.steps)
        output = jax.block_until_ready(self.compiled(self.state, self.program.batch, key))
        seconds, loss = time.perf_counter() - started, None
        if self.program.loss is not None:
            self.state = output[0]
            loss = float(output[1][self.program.loss])
        self.steps += 1
        return {"seconds": seconds, "loss": loss}

    def stop(self) -> dict[str, Any]:
        """The peak memory, and the number of programs compiled after the first step."""
        return {**peak_bytes(self.was_reset), "compilations_after_first_step": self.compilations}


if __name__ == "__main__":
    main()
