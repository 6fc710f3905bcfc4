"""Memory, processor time and losses of the first steps of a run, as one line of JSON.

python tools/measure_steps.py TRAINER --steps 7 --config FILE.yaml --section.key value ...

Of the process, without evaluations, exports and checkpoints: the most memory in GiB after the first
step, whose freed memory is returned first, and medians of the steps after the first, which
compiles. Linux alone.
"""

import json
import pathlib
import sys
import time

import jax
import numpy as np

from rlhf_jax.backend import trim_heap
from rlhf_jax.runtime.commands.main import stage_of
from rlhf_jax.runtime.config import config_of, parse, trainer_named


def peak_memory() -> float:
    """GiB: the most that the process has held since it was last reset."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(value) / 2**20


def main() -> None:
    """Runs the steps and prints the line."""
    name, _, steps, *flags = sys.argv[1:]
    config = parse(config_of(trainer_named(name)), flags)
    pathlib.Path(config.run_dir).mkdir(parents=True, exist_ok=True)  # for a reference of DPO
    stage = stage_of(config)
    with jax.set_mesh(stage.mesh):
        state = stage.init_state()
        seconds, losses = [], []
        for index in range(int(steps)):
            start = time.perf_counter(), time.process_time()
            state, metrics, _ = stage.step(state, index)
            losses.append(round(float(metrics["train/loss"]), 4))
            seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            if index == 0:
                trim_heap()  # as in the commands after the first step
                pathlib.Path("/proc/self/clear_refs").write_text("5")
    wall, processor = np.median(seconds[1:], axis=0)
    numbers = {"peak_gib": peak_memory(), "step_s": wall, "processor_s": processor}
    print(json.dumps({**numbers, "losses": losses}))


if __name__ == "__main__":
    main()
