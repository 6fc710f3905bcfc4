"""The tool that makes the table of docs/scaling.md."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("scaling_table", ROOT / "tools" / "scaling_table.py")
assert SPEC is not None
assert SPEC.loader is not None
scaling_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scaling_table)

LISTED = yaml.safe_load((ROOT / "tools" / "scaling_rows.yaml").read_text())
ROW = ["gpt2-xl", "sft", "v5e:16x16", "4x64x1", "--sft.gradient_accumulation_steps 2"]
PROGRAM = {
    "fits": True,
    "arguments": 2**30,
    "peak": 3 * 2**30,
    "flops": 1e12,
    "seconds": 0.25,
}
REFUSED = {"fits": False, "needed": "47G", "available": "15.75G", "flops": 1e12, "seconds": 0.1}


def test_every_row_is_a_command_of_its_own():
    names = [scaling_table.name_of(row) for row in LISTED["rows"]]
    assert len(set(names)) == len(names)
    for row in LISTED["rows"]:
        flags = scaling_table.flags_of(row, LISTED["common"])
        assert flags[:4] == ["--topology", row[2], "--model", row[0]]
    assert scaling_table.flags_of(ROW, LISTED["common"])[6:8] == ["--mesh.data", "4"]


def test_every_row_is_in_the_table():
    """One line each, and none that the list lacks."""
    table = scaling_table.PAGE.read_text().split(scaling_table.BEGIN)[1]
    lines = table.split(scaling_table.END)[0].strip().splitlines()[2:]
    cells = [[cell.strip(" `") for cell in line.split("|")[1:6]] for line in lines]
    assert cells == [[*row[:3], row[3].replace("x", " x "), row[4]] for row in LISTED["rows"]]


@pytest.mark.parametrize(
    ("programs", "cells"),
    [
        ([PROGRAM], "1 GiB | 3 GiB | 1e+12 | 0.25 s |"),
        ([PROGRAM, {**PROGRAM, "peak": 2**32}], "1 GiB | 4 GiB | 2e+12 | 0.5 s |"),
        ([REFUSED], " | does not fit: 47G of 15.75G | 1e+12 | 0.1 s |"),
    ],
)
def test_a_line_has_the_sums_and_the_greatest_memory(programs, cells):
    line = scaling_table.line_of(ROW, {"programs": programs})
    assert line.startswith("| gpt2-xl | sft | v5e:16x16 | 4 x 64 x 1 | `--sft.gradient_acc")
    assert line.endswith(cells)
    assert line.count("|") == scaling_table.HEADER.splitlines()[0].count("|")


def test_a_line_that_is_not_compiled_stays_as_it_is(tmp_path):
    file, line = tmp_path / "row.json", scaling_table.line_of(ROW, {"programs": [PROGRAM]})
    page = ["text", line, line.replace("4 x 64 x 1", "8 x 32 x 1")]
    assert scaling_table.lines_of(ROW, file, page) == [line]
    assert scaling_table.lines_of(ROW, file, []) == []
    file.write_text(json.dumps({"programs": [{**PROGRAM, "peak": 2**32}]}))
    (new,) = scaling_table.lines_of(ROW, file, page)
    assert "4 GiB" in new


def test_the_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling_table.BEGIN}\nold\n{scaling_table.END}\nafter\n")
    for _ in range(2):
        scaling_table.write_table(page, "new")
    text = f"before\n{scaling_table.BEGIN}\nnew\n{scaling_table.END}\nafter\n"
    assert page.read_text() == text
