"""Measures our steps side by side with those of TRL: times, memory, and the way to the floor.

python scripts/benchmark.py --workloads '[sft_mid, generate_mid]' --rounds 5 --json FILE
"""

import os
import sys

from rlhf_jax.runtime import cli


def main() -> None:
    """The command. Processes that share a GPU take the memory they need, and not most of it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from rlhf_jax.benchmark.command import run_benchmark
    from rlhf_jax.benchmark.settings import BenchmarkError

    try:
        run_benchmark()
    except BenchmarkError as error:
        sys.exit(f"error: {error}.")


if __name__ == "__main__":
    sys.exit(cli.run(main))
