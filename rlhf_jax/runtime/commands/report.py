"""The command `report`: the page of a run, or one page of several runs."""

import argparse
import sys
from collections.abc import Sequence

from rlhf_jax.runtime.commands import terminal


def main(argv: Sequence[str]) -> int:
    """Runs `rlhf report RUN [RUN ...]`; the exit status is that of `terminal.run`."""
    parser = argparse.ArgumentParser(
        prog="rlhf report",
        allow_abbrev=False,
        description="Writes the report of a run folder anew, also of a run that goes on or was "
        "interrupted; of several, one page with their curves together and the settings that "
        "differ.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page of several runs (default: comparison.html); that of one is its report.html",
    )
    arguments = parser.parse_args(argv)
    return terminal.run(lambda: _write(arguments.runs, arguments.output))


def _write(runs: Sequence[str], output: str | None) -> None:
    from rlhf_jax.errors import InputError
    from rlhf_jax.runtime.report.page import write_comparison, write_report

    if len(runs) > 1:
        path = write_comparison(runs, output or "comparison.html")
    elif output is None:
        path = write_report(runs[0], "make the folder writable")
    else:
        raise InputError("--output is for the page of several runs; give another run folder.")
    print(f"report: {path}", file=sys.stderr)
