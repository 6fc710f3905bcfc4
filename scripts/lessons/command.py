"""The command line of the lessons, with errors in one line."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands.terminal import INPUT_ERROR


def run(main: Callable, description: str) -> None:
    """Calls `main(seed, output)` with the flags of the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    folder = f"runs/lessons/{Path(sys.argv[0]).stem}"
    parser.add_argument("--output", default=folder, help=f"folder of the plots (default: {folder})")
    arguments = parser.parse_args()
    try:
        check(arguments.seed, Path(arguments.output))
        main(arguments.seed, arguments.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(INPUT_ERROR)
    print(f"Plots: {arguments.output}/*.svg")


def check(seed: int, output: Path) -> None:
    """Raises an InputError for flags that would fail only after the training."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed is {seed}; give a whole number from 0 to 4294967295.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise InputError(
            f"--output {output} cannot be a folder of plots: {error.strerror}; give another."
        ) from error
