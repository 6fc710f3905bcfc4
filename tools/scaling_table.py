"""Makes the table of docs/scaling.md: compiles what tools/scaling_rows.yaml lists, row by row.

python tools/scaling_table.py [--folder build/scaling] [--only TEXT] [--again]

Each row is one call of scripts/compile_for.py, whose numbers are kept in the folder: what is there
already is not compiled again, so that the tool may be stopped and started. The table goes between
the two marks of docs/scaling.md, made of all rows that are there.
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
    "| Model | Stage | Slice | data x fsdp x tensor | Settings | State | Held at most | Fits | "
    "FLOPs | Received | At least | Bound by | What breaks, or is largest |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    """Compiles the rows that are missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "scaling")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--again", action="store_true", help="compiles rows that are there, too")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    listed = yaml.safe_load((ROOT / "tools" / "scaling_rows.yaml").read_text())
    lines = []
    for row in listed["rows"]:
        file = options.folder / f"{name_of(row)}.json"
        if options.only in file.name and (options.again or not file.exists()):
            compile_row(row, listed["common"], file)
        if file.exists():
            lines.append(line_of(row, json.loads(file.read_text())))
    write_table(PAGE, "\n".join([HEADER, *lines]))


def name_of(row: list[str]) -> str:
    """A file's name of a row."""
    return re.sub(r"[^\w.]+", "-", " ".join(row)).strip("-")


def flags_of(row: list[str], common: dict[str, str]) -> list[str]:
    """The flags of scripts/compile_for.py that a row stands for."""
    model, stage, topology, mesh, settings = row
    sizes = zip(("data", "fsdp", "tensor"), mesh.split("x"), strict=True)
    return [
        *("--topology", topology, "--model", model, "--stage", stage),
        *(part for axis, size in sizes for part in (f"--mesh.{axis}", size)),
        *shlex.split(common[f"{model} {stage}"]),
        *shlex.split(settings),
    ]


def compile_row(row: list[str], common: dict[str, str], file: Path) -> None:
    """Calls the command for a row; what it says of a wrong one is printed, and it is left out."""
    command = [sys.executable, str(ROOT / "scripts" / "compile_for.py"), *flags_of(row, common)]
    print(" ".join(row), file=sys.stderr, flush=True)
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True)
    if done.returncode:
        print(f"left out: {done.stderr.strip()[-500:]}", file=sys.stderr, flush=True)


def line_of(row: list[str], found: dict[str, Any]) -> str:
    """One line of the table: of several programs the sums, and the most that one of them holds."""
    programs = found["programs"]
    whole = [program for program in programs if "needed" not in program]
    flops = sum(program["flops"] for program in programs)
    compiled = len(whole) == len(programs)
    state, held, received, seconds, bound, remark = "", "", "", "", "", ""
    if compiled:
        state = gib(max(p["arguments"] + p["unread"] for p in whole))
        held = gib(max(p["peak"] + p["unread"] for p in whole))
        received = f"{sum(p['received'] for p in whole) / 1e9:.3g} GB"
        seconds = f"{sum(p['roofline']['seconds'] for p in whole):.3g} s"
        bound = max(whole, key=lambda p: p["roofline"]["seconds"])["roofline"]["bound"]
        remark = largest(whole)
    else:
        first = next(program for program in programs if "needed" in program)
        remark = f"needs {first['needed']} of {first['available']}"
    fits = "yes" if compiled and all(program["fits"] for program in programs) else "no"
    settings = f"`{row[4]}`" if row[4] else ""
    cells = [row[0], row[1], row[2], row[3].replace("x", " x "), settings, state, held, fits]
    cells += [f"{flops:.3g}", received, seconds, bound, remark]
    return f"| {' | '.join(cells)} |"


def largest(programs: list[dict[str, Any]]) -> str:
    """The collective that receives most."""
    found = [each for program in programs for each in program["collectives"]]
    if not found:
        return ""
    most = max(found, key=lambda each: each["total"])
    shape = most["shape"] if len(most["shape"]) < 40 else f"{most['shape'][:30]}..."
    return f"{most['kind']} {shape}, {most['times']} times: {most['total'] / 1e9:.3g} GB"


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
