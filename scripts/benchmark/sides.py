"""The sides of a workload: processes of this library and of TRL that run their steps in turn."""

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
    """The command of a side.

    Attributes:
      name: "ours", "ours_bfloat16" or "trl".
      argv: the arguments, before the files of the request and of the arrays.
      dtype: the compute dtype.
      environment: all environment variables of the process.
    """

    name: str
    argv: Sequence[str]
    dtype: str
    environment: Mapping[str, str]


def our_command(dtype: str) -> SideCommand:
    """This library, with the running Python and the rlhf_jax of this clone, on one device."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    name = "ours" if dtype == "float32" else f"ours_{dtype}"
    argv = [sys.executable, "-m", "scripts.benchmark.ours"]
    # GPU memory is allocated as needed, so that the peak is that of the workload.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "PYTHONPATH": path}
    return SideCommand(name, argv, dtype, variables)


def trl_command(python: str | os.PathLike[str], dtype: str, platform: str = "cpu") -> SideCommand:
    """TRL, with the Python of its virtual environment and no package of this one.

    Args:
      platform: that of JAX. On "cpu" GPUs are hidden from PyTorch, on "gpu" all but the first.
    """
    removed = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    kept["CUDA_VISIBLE_DEVICES"] = _first_gpu() if platform == "gpu" else ""
    # Weights and texts are random, and nothing is read from the hub.
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    argv = [os.fspath(python), str(Path(__file__).with_name("trl_worker.py"))]
    return SideCommand("trl", argv, dtype, kept)


def commands_for(commands: Sequence[SideCommand], workload: Workload) -> list[SideCommand]:
    """The commands for a workload, without TRL if it has no peer; a fixed dtype replaces theirs."""
    chosen = [each for each in commands if workload.has_peer or each.name != "trl"]
    if workload.fixed_dtype is None:
        return chosen
    chosen = [each for each in chosen if each.name in ("ours", "trl")]
    return [each._replace(dtype=workload.fixed_dtype) for each in chosen]


def _first_gpu() -> str:
    """The default device of JAX; the trainers of transformers would use all GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


class Side:
    """A running side, idle between an answer and the next request.

    Args:
      command: its command.
      workload: the workload that it runs.
      folder: for its files.

    Every method raises a BenchmarkError if the process ended or its answer is not valid.
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
                # Temporary files of its libraries are deleted with the folder.
                env={**command.environment, "TMPDIR": str(folder)},
            )

    def wait(self) -> None:
        """Waits until the side is ready for its first step, and sets `ready` to its description."""
        self.ready = self._answer("ready")

    def step(self) -> dict[str, Any]:
        """Runs one step: {"seconds", ...}."""
        return self._request("step", "seconds")

    def reset(self) -> None:
        """Resets the peak memory."""
        self._write("reset")

    def stop(self) -> dict[str, Any]:
        """Ends the process: {"peak_bytes", ...}."""
        return self._request("stop", "peak_bytes")

    def close(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.communicate()

    def _request(self, line: str, key: str) -> dict[str, Any]:
        self._write(line)
        return self._answer(key)

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None  # a pipe
        with contextlib.suppress(BrokenPipeError):  # reported by `_answer`
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _answer(self, key: str) -> dict[str, Any]:
        assert self.process.stdout is not None  # a pipe
        line = self.process.stdout.readline()
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict) and key in answer:
                return answer
        last = self.log.read_text().strip().splitlines()[-1:] or ["nothing on standard error"]
        reason = f"answered {line.strip()[:60]!r}" if line else f"ended with: {last[0][:300]}"
        raise BenchmarkError(f"{self.name} could not run {self.workload.name}: it {reason}")


@contextlib.contextmanager
def running(commands: Sequence[SideCommand], workload: Workload) -> Iterator[list[Side]]:
    """The sides of a workload, ready for their first steps; killed at the end of the block."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides = []
        for command in commands:
            place = Path(folder) / command.name
            place.mkdir()
            side = Side(command, workload, place)
            stack.callback(side.close)
            side.wait()  # one compiles at a time
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
    """Measures a workload: steps of each side in turn, in one round after the other.

    Where sides alternate, a measured step follows another of the same side, as in a run: during a
    pause of seconds the host of a virtual machine may take back the memory that a step has freed.

    Args:
      commands: the sides.
      workload: the workload.
      rounds: measured steps of each side.
      warmup: steps before them, one in a turn.
      alternate: if False, one side ends before the next starts, and so holds no memory.

    Returns:
      By the name of the side: {"ready": its description, "warmup_seconds": [...], "seconds": [...],
      "losses": [...], and its answer to "stop"}.
    """
    if not alternate:
        turns = (
            take_turns([command], workload, rounds=rounds, warmup=warmup) for command in commands
        )
        return {name: result for side in turns for name, result in side.items()}
    with running(commands, workload) as sides:
        steps: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
        for turn in range(warmup + rounds):
            for side in sides:
                if turn == warmup:
                    side.reset()
                if turn >= warmup and len(sides) > 1:
                    side.step()
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
