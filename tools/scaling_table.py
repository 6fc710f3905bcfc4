"""Makes the table of docs/scaling.md: compiles the lines that tools/scaling_rows.yaml lists.

python tools/scaling_table.py [--folder build/scaling] [--only TEXT] [--again]

Each line is one call of scripts/compile_for.py, whose numbers are kept in the folder and not
compiled again, so that the tool may be interrupted. The table is written between the two marks of
docs/scaling.md. A line that `--only` leaves out and the folder lacks stays as it is there; one that
does not compile is removed.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- table: tools/scaling_table.py -->", "<!-- end of the table -->"
HEADER = (
    "| Model | Stage | Slice | data x fsdp x tensor | Settings | State and batch | Held at most | "
    "FLOPs | At least |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    """Compiles the lines that are missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "scaling")
    parser.add_argument("--only", default="", help="lines whose name contains this text")
    parser.add_argument("--again", action="store_true", help="compiles all lines again")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    listed = yaml.safe_load((ROOT / "tools" / "scaling_rows.yaml").read_text())
    lines, before = [], PAGE.read_text().splitlines()
    for row in listed["rows"]:
        file = options.folder / f"{name_of(row)}.json"
        compiles = options.only in file.name and (options.again or not file.exists())
        if compiles:
            file.unlink(missing_ok=True)
            compile_row(row, listed["common"], file)
        lines += lines_of(row, file, [] if compiles else before)
    write_table(PAGE, "\n".join([HEADER, *lines]))


def name_of(row: list[str]) -> str:
    """The name of the file of a line."""
    return re.sub(r"[^\w.]+", "-", " ".join(row)).strip("-")


def flags_of(row: list[str], common: dict[str, str]) -> list[str]:
    """The flags of scripts/compile_for.py for a line."""
    model, stage, topology, mesh, settings = row
    sizes = zip(("data", "fsdp", "tensor"), mesh.split("x"), strict=True)
    return [
        *("--topology", topology, "--model", model, "--stage", stage),
        *(part for axis, size in sizes for part in (f"--mesh.{axis}", size)),
        *shlex.split(common[stage]),
        *shlex.split(settings),
    ]


def compile_row(row: list[str], common: dict[str, str], file: Path) -> None:
    """Calls the command for a line; an error is printed, and the line left out."""
    command = [sys.executable, str(ROOT / "scripts" / "compile_for.py"), *flags_of(row, common)]
    print(" ".join(row), file=sys.stderr, flush=True)
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True)
    if done.returncode:
        print(f"left out: {done.stderr.strip()[-500:]}", file=sys.stderr, flush=True)


def lines_of(row: list[str], file: Path, page: list[str]) -> list[str]:
    """The line of a row, if there is one: of its file, or else as it is on the page."""
    if file.exists():
        return [line_of(row, json.loads(file.read_text()))]
    return [line for line in page if line.startswith(naming_cells(row))]


def line_of(row: list[str], numbers: dict[str, Any]) -> str:
    """One line of the table: sums over the programs, and the most memory that one of them holds."""
    programs = numbers["programs"]
    refused = [program for program in programs if not program["fits"]]
    if refused:
        memory = ["", f"does not fit: {refused[0]['needed']} of {refused[0]['available']}"]
    else:
        memory = [gib(max(each[key] for each in programs)) for key in ("arguments", "peak")]
    flops, seconds = (sum(each[key] for each in programs) for key in ("flops", "seconds"))
    return f"{naming_cells(row)}{' | '.join(memory)} | {flops:.3g} | {seconds:.3g} s |"


def naming_cells(row: list[str]) -> str:
    """The cells of a line up to its settings."""
    settings = f"`{row[4]}`" if row[4] else ""
    return f"| {' | '.join([*row[:3], row[3].replace('x', ' x '), settings])} | "


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.3g} GiB"


def write_table(page: Path, table: str) -> None:
    """Puts the table between the marks of the page."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
