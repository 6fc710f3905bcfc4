"""Kills runs at random moments, continues them, and compares the results.

    nice .venv/bin/python tools/kill_and_continue.py --kills 30 --seed 0

A run without interruption comes first. Then the same run, in another folder, is killed by SIGKILL
and started again with the same configuration, `--kills` times. Half of the kills come at a moment
that is uniform over the time that the run takes, half while a checkpoint is written. At the end
parameters, optimizer state, metrics.jsonl (but for `time` and `perf/*`) and samples.jsonl must be
those of the first run, bit for bit; the exit status is 1 if they are not.

Each attempt is forked from this process, which has imported everything but has not initialized
JAX's devices: so it starts in a second. It takes about ten minutes on two CPU cores.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # no threads that a fork would lose
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf_jax.runtime import run_rlhf, train_ppo, train_reward, train_sft  # noqa: E402
from tests import small  # noqa: E402

STAGES = ("sft", "reward", "ppo", "rlhf")
PARTS = ("sft", "reward", "ppo")
LATEST = 0.7  # of the time of a run: after that there may be no save to wait for
POLL = 0.002


@dataclasses.dataclass(frozen=True)
class Job:
    """One stage of so many steps: what runs it in a folder, and how many steps it has."""

    name: str
    train: Callable[[Any], Any]
    config: Callable[[Path], dict[str, Any]]
    steps: int

    def folders(self, run_dir: Path) -> list[Path]:
        """The folders of the stages inside that of the run."""
        return [run_dir / part for part in PARTS] if self.name == "rlhf" else [run_dir]


def make_job(name: str, base: Path, steps: int) -> Job:
    """A small run that saves every second step and keeps its best one; models are in base."""
    epochs = steps / small.STEPS
    best = {"best_metric": "eval/scores" if name == "ppo" else "eval/loss"}
    shared = {"checkpoint": {"every": 2, "best_mode": "max" if name == "ppo" else "min", **best}}
    shared |= {"logging": {"eval_every": 4, "samples_every": 4, "progress": False}}
    of_ppo = {"total_episodes": 8 * steps, "scale_reward": "running"}
    if name == "sft":
        settings = {"num_epochs": epochs}
        return Job(name, train_sft, lambda d: small.sft(d, sft=settings, **shared), steps)
    if name == "reward":
        settings = {"num_epochs": epochs}
        config = lambda d: small.reward(d, base / "sft", reward=settings, **shared)  # noqa: E731
        return Job(name, train_reward, config, steps)
    if name == "ppo":
        config = lambda d: small.ppo(d, base / "sft", base / "reward", ppo=of_ppo, **shared)  # noqa: E731
        return Job(name, train_ppo, config, steps)
    parts = {"sft": {"num_epochs": epochs}, "reward": {"num_epochs": epochs}, "ppo": of_ppo}
    return Job(name, run_rlhf, lambda d: small.rlhf(d, **parts, **shared), steps)


def start(function: Callable[..., Any], *args: Any, log: Path) -> int:
    """Calls function(*args) in a process of its own; its number."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    status = 1
    try:
        os.setpgid(0, 0)
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(function: Callable[..., Any], *args: Any, log: Path) -> float:
    """The seconds that function(*args) takes in a process of its own.

    Raises:
      SystemExit: it failed; the message says why.
    """
    began = time.monotonic()
    if os.waitpid(start(function, *args, log=log), 0)[1]:
        raise SystemExit(f"{log.read_text()[-4000:]}\n{args} failed")
    return time.monotonic() - began


def unfinished(job: Job, run_dir: Path) -> set[Path]:
    """The folders of checkpoints that are incomplete."""
    paths = (folder.glob("checkpoints/*.orbax-checkpoint-tmp*") for folder in job.folders(run_dir))
    return {path for each in paths for path in each}


def logged(job: Job, run_dir: Path) -> list[float]:
    """The times at which the lines of metrics were written."""
    files = [folder / "metrics.jsonl" for folder in job.folders(run_dir)]
    lines = [file.read_bytes().split(b"\n")[:-1] for file in files if file.exists()]
    return [json.loads(line)["time"] for each in lines for line in each]


def is_exporting(job: Job, run_dir: Path) -> bool:
    """Whether a stage has nothing left to do but to write its model and report."""
    return any(
        (folder / "checkpoints" / str(job.steps)).exists() and not (folder / "report.html").exists()
        for folder in job.folders(run_dir)
    )


def attempt(job: Job, run_dir: Path, seconds: float, aimed: bool, rng: random.Random) -> str | None:
    """Starts or continues the run, and kills it; what it was doing then, None if it had ended."""
    began = time.time()
    # A save that was killed leaves its folder until the next one begins: wait for a new one.
    old = unfinished(job, run_dir)
    process = start(job.train, job.config(run_dir), log=run_dir.with_suffix(".log"))
    at = time.monotonic() + rng.uniform(0.0, seconds * (LATEST if aimed else 1.0))
    while time.monotonic() < at or (aimed and not unfinished(job, run_dir) - old):
        if os.waitpid(process, os.WNOHANG)[0]:
            return None
        time.sleep(POLL)
    time.sleep(rng.uniform(0.0, 0.05) if aimed else 0.0)
    os.killpg(process, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(process, 0)[1]):
        return None
    if unfinished(job, run_dir) - old:
        return "saving"
    if is_exporting(job, run_dir):
        return "exporting"
    return "stepping" if max(logged(job, run_dir), default=0.0) > began else "starting"


def compare(job: Job, uninterrupted: Path, killed: Path) -> None:
    """Raises an AssertionError unless two runs are the same, bit for bit."""
    for first, second in zip(job.folders(uninterrupted), job.folders(killed), strict=True):
        small.assert_same_run(first, second, job.steps)
        steps = [entry["step"] for entry in small.entries(second / "metrics.jsonl")]
        assert steps == list(range(1, job.steps + 1)), steps


def kill(job: Job, base: Path, kills: int, rng: random.Random) -> collections.Counter:
    """Kills a stage that many times, over as many runs as needed; counts by moment."""
    uninterrupted, log = base / f"{job.name}_uninterrupted", base / f"{job.name}.log"
    finish(job.train, job.config(uninterrupted), log=log)  # which compiles
    seconds = finish(job.train, job.config(base / f"{job.name}_again"), log=log)
    compared = (job, uninterrupted)
    finish(compare, *compared, base / f"{job.name}_again", log=log)
    print(f"{job.name}: a run of {job.steps} steps takes {seconds:.1f} s", flush=True)
    moments, run = collections.Counter(), 0
    while moments.total() < kills:
        run_dir, run = base / f"{job.name}_{run}", run + 1
        alive = True
        while alive and moments.total() < kills:
            began = time.monotonic()
            when = attempt(job, run_dir, seconds, bool(rng.randrange(2)), rng)
            alive = when is not None
            if alive:
                moments[when] += 1
                seconds_alive = time.monotonic() - began
                place = f"run {run}, kill {moments.total():2} after {seconds_alive:5.1f} s"
                lines = len(logged(job, run_dir))
                print(f"  {job.name} {place}, {lines:2} lines: {when}", flush=True)
        finish(job.train, job.config(run_dir), log=run_dir.with_suffix(".log"))
        finish(compare, *compared, run_dir, log=run_dir.with_suffix(".log"))
        print(f"  {job.name} run {run} equals the uninterrupted one", flush=True)
    return moments


def trained(base: Path, stages: Sequence[str]) -> Path:
    """The folder with the runs that those of the stages start from."""
    for name in PARTS[: 2 if {"reward", "ppo"} & {*stages} else 0]:
        job = make_job(name, base, small.STEPS)
        finish(job.train, job.config(base / name), log=base / f"{name}.log")
    return base


def main() -> int:
    """Runs the stages of the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of all stages together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument("--steps", type=int, default=24, help="of each stage, a multiple of 4")
    parser.add_argument("--folder", help="where the runs are left; by default they are removed")
    parser.add_argument("--cache", help="a folder of compiled programs")
    parser.add_argument("--models", help="a folder with runs in sft/ and reward/ to start from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(options.folder or temporary).resolve()
        base.mkdir(parents=True, exist_ok=True)
        small.use_cache(options.cache or base / "compiled")
        rng, counts_of = random.Random(options.seed), {}
        models = Path(options.models) if options.models else trained(base, options.stage)
        for place, name in enumerate(options.stage):
            count = len(options.stage)
            kills = options.kills * (place + 1) // count - options.kills * place // count
            counts_of[name] = kill(make_job(name, models, options.steps), base, kills, rng)
    moments = ("starting", "stepping", "saving", "exporting")
    print("| killed while | " + " | ".join(moments) + " | all |")
    print("| --- |" + " ---: |" * 5)
    for name, counts in counts_of.items():
        cells = [*(counts[each] for each in moments), counts.total()]
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
