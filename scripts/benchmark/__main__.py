"""The command `scripts/benchmark.py`: its flags, and its end by a signal."""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands import terminal
from scripts.benchmark.settings import BenchmarkConfig, BenchmarkError, expand_peer_flag

# What the help lists first.
FIRST = ("workloads", "rounds", "peer.name", "peer.python", "dtype", "json")


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    # Processes that share a GPU allocate memory as they need it, instead of three quarters of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    signal.signal(signal.SIGTERM, _terminate)
    flags = expand_peer_flag(argv)
    try:
        return terminal.run_command(
            "scripts/benchmark.py", BenchmarkConfig, measure, flags, first=FIRST
        )
    except _TerminatedError as terminated:
        return 128 + terminated.number


def measure(config: BenchmarkConfig) -> None:
    """Runs the benchmark with settings that were parsed."""
    try:
        # Imports JAX, which reads the environment set above.
        from scripts.benchmark.command import run_benchmark

        run_benchmark(config)
    except BenchmarkError as error:
        raise InputError(f"{error}.") from error
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            "Interrupted; the same command measures everything again, and a file given by --json "
            "holds the workloads that were finished."
        ) from interrupt


class _TerminatedError(BaseException):
    """A signal ended the command; as an exception, measured processes and files go first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _TerminatedError(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
