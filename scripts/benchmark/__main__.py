"""Measures our steps side by side with those of TRL: times, memory, and the way to the floor.

python scripts/benchmark.py --workloads '[sft_mid, generate_mid]' --rounds 5 --json FILE
"""

import os
import signal
import sys
from types import FrameType

from rlhf_jax.runtime.commands import terminal as cli


def main() -> None:
    """The command. Processes that share a GPU take the memory they need, and not most of it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    signal.signal(signal.SIGTERM, terminate)
    try:
        measure()
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            "Interrupted; the same command measures all again, and a file given by --json holds "
            "the workloads that were done."
        ) from interrupt


def terminate(number: int, frame: FrameType | None) -> None:
    """Ends the command so that it still ends the sides and deletes their files."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def measure() -> None:
    """The benchmark by the flags of the command line."""
    from scripts.benchmark.command import run_benchmark
    from scripts.benchmark.settings import BenchmarkError

    try:
        run_benchmark()
    except BenchmarkError as error:
        sys.exit(f"error: {error}.")


if __name__ == "__main__":
    sys.exit(cli.run(main))
