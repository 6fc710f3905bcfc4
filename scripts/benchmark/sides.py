"""Both sides of a workload as processes that take turns."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.benchmark.settings import BenchmarkError
from scripts.benchmark.workloads import Workload, make_arrays, make_request

ROOT = Path(__file__).resolve().parents[2]


class SideCommand(NamedTuple):
    """A program that does a workload.

    Attributes:
      name: "ours", "ours_bfloat16" or "trl".
      argv: to which the files of the request and of the arrays are appended.
      dtype: what it computes in.
      environment: what it is given of variables.
    """

    name: str
    argv: Sequence[str]
    dtype: str
    environment: Mapping[str, str]


def our_command(dtype: str) -> SideCommand:
    """Our side: this Python, and this very rlhf_jax, on one device."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    name = "ours" if dtype == "float32" else f"ours_{dtype}"
    argv = [sys.executable, "-m", "scripts.benchmark.ours"]
    # Of a GPU's memory it takes what it needs, so that its peak is its own.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "PYTHONPATH": path}
    return SideCommand(name, argv, dtype, variables)


def trl_command(python: str | os.PathLike[str], dtype: str, platform: str = "cpu") -> SideCommand:
    """TRL, by the Python of its virtual environment, which sees no package of ours.

    Args:
      platform: what JAX computes on: of "cpu" PyTorch sees no GPU, of "gpu" the first alone.
    """
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    kept["CUDA_VISIBLE_DEVICES"] = _first_gpu() if platform == "gpu" else ""
    # Nothing of the hub is needed: weights and texts are random.
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    argv = [os.fspath(python), str(Path(__file__).with_name("trl_worker.py"))]
    return SideCommand("trl", argv, dtype, kept)


def commands_for(commands: Sequence[SideCommand], workload: Workload) -> list[SideCommand]:
    """Those of a workload: in its own dtype each side once, without TRL where it has no peer."""
    chosen = [each for each in commands if workload.has_peer or each.name != "trl"]
    if workload.fixed_dtype is None:
        return chosen
    chosen = [each for each in chosen if each.name in ("ours", "trl")]
    return [each._replace(dtype=workload.fixed_dtype) for each in chosen]


def _first_gpu() -> str:
    """The one that JAX computes on by default; the trainers of transformers would take all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


class Side:
    """A running side. It works only between a question and its answer.

    Args:
      command: what runs.
      workload: what it is to do.
      folder: for its files.

    Raises:
      BenchmarkError: of each method: it ended, or said something else than was asked for.
    """

    def __init__(self, command: SideCommand, workload: Workload, folder: Path) -> None:
        self.name, self.workload = command.name, workload
        request, arrays = folder / "request.json", folder / "arrays.npz"
        self.log, self.ready = folder / "stderr", dict[str, Any]()
        request.write_text(json.dumps(make_request(workload, command.dtype)))
        np.savez(arrays, **make_arrays(workload))  # type: ignore[arg-type]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command.argv, str(request), str(arrays)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # What its libraries leave there goes with the folder.
                env={**command.environment, "TMPDIR": str(folder)},
            )

    def wait(self) -> None:
        """Waits until the first step may begin; `ready` is what the side then says of itself."""
        self.ready = self._answer("ready")

    def step(self) -> dict[str, Any]:
        """One step: {"seconds", ...}."""
        return self._ask("step", "seconds")

    def reset(self) -> None:
        """Forgets the peak of memory until now."""
        self._write("reset")

    def stop(self) -> dict[str, Any]:
        """Ends it: {"peak_bytes", ...}."""
        return self._ask("stop", "peak_bytes")

    def close(self) -> None:
        """Ends it whatever it does."""
        self.process.kill()
        self.process.communicate()

    def _ask(self, question: str, key: str) -> dict[str, Any]:
        self._write(question)
        return self._answer(key)

    def _write(self, question: str) -> None:
        assert self.process.stdin is not None  # a pipe
        with contextlib.suppress(BrokenPipeError):  # told of where the answer is missing
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()

    def _answer(self, key: str) -> dict[str, Any]:
        assert self.process.stdout is not None  # a pipe
        line = self.process.stdout.readline()
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict) and key in answer:
                return answer
        said = self.log.read_text().strip().splitlines()[-1:] or ["nothing"]
        reason = f"answered {line.strip()[:60]!r}" if line else f"ended, and said: {said[0][:300]}"
        raise BenchmarkError(f"{self.name} could not do {self.workload.name}: it {reason}")


@contextlib.contextmanager
def running(commands: Sequence[SideCommand], workload: Workload) -> Iterator[list[Side]]:
    """The sides of a workload, each ready for its first step; ended with the block."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides = []
        for command in commands:
            place = Path(folder) / command.name
            place.mkdir()
            side = Side(command, workload, place)
            stack.callback(side.close)
            side.wait()  # the next one is not to disturb what this one compiles
            sides.append(side)
        yield sides


def take_turns(
    commands: Sequence[SideCommand],
    workload: Workload,
    *,
    rounds: int,
    warmup: int,
    alternate: bool = True,
) -> dict[str, dict[str, Any]]:
    """Measures a workload: a step of each side, then the next step of each, and so on.

    Args:
      commands: the sides.
      workload: what they do.
      rounds: steps that count.
      warmup: steps before them.
      alternate: False has one side end before the next begins, so that it holds no memory then.

    Returns:
      By the side's name: {"ready": what it said of itself, "warmup_seconds": [...], "seconds":
      [...], "losses": [...], and what it said at its end}.
    """
    if not alternate:
        turns = (
            take_turns([command], workload, rounds=rounds, warmup=warmup) for command in commands
        )
        return {name: found for side in turns for name, found in side.items()}
    with running(commands, workload) as sides:
        steps: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
        for turn in range(warmup + rounds):
            for side in sides:
                if turn == warmup:
                    side.reset()
                steps[side.name].append(side.step())
        return {
            side.name: {
                "ready": side.ready,
                "warmup_seconds": [step["seconds"] for step in steps[side.name][:warmup]],
                "seconds": [step["seconds"] for step in steps[side.name][warmup:]],
                "losses": [step.get("loss") for step in steps[side.name]],
                **side.stop(),
            }
            for side in sides
        }
