"""The command `scripts/benchmark.py`, prepared so that a signal ends it cleanly."""

import os
import signal
import sys
from types import FrameType

from rlhf_jax.runtime.commands import terminal


def main() -> None:
    """Runs the benchmark with the flags of the command line."""
    # Processes that share a GPU take the memory they need, instead of three quarters of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run()
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            "Interrupted; the same command measures everything again, and a file given by --json "
            "holds the workloads that were finished."
        ) from interrupt


def _run() -> None:
    # Imports JAX, which reads the environment set above.
    from scripts.benchmark.command import run_benchmark
    from scripts.benchmark.settings import BenchmarkError

    try:
        run_benchmark()
    except BenchmarkError as error:
        sys.exit(f"error: {error}.")


def _terminate(number: int, frame: FrameType | None) -> None:
    """Raises SystemExit, so that the measured processes end and their files are deleted."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(terminal.run(main))
