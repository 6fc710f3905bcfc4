"""The tool that measures how cost grows."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = {"layers": 1, "width": 8, "batch": 1, "length": 4}


@pytest.fixture(scope="module")
def growth():
    """tools/growth.py as a module; its entries of sys.path are removed."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("growth", ROOT / "tools" / "growth.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    sys.modules.pop("plots", None)


class Counted:
    """A point whose value is its number of calls, a hundred times its batch added."""

    max_rounds = None

    def __init__(self, size):
        self.calls, self.start = 0, 100 * size.batch

    def __call__(self):
        self.calls += 1
        return self.start + self.calls


class CountedOnce(Counted):
    max_rounds = 1


def test_a_point_is_the_median_of_rounds_after_the_first(growth):
    points = growth.measured(growth.Curve(Counted, "batch", (1, 2)), 3)
    assert points == [
        {"batch": 1, "median": 103, "values": [102, 103, 104]},
        {"batch": 2, "median": 203, "values": [202, 203, 204]},
    ]
    (point,) = growth.measured(growth.Curve(CountedOnce, "batch", (1,)), 3)
    assert point["values"] == [101]


@pytest.mark.newest
def test_it_writes_numbers_and_figures(growth, monkeypatch, tmp_path, capsys):
    base = growth.Size(**TINY)
    curves = {
        "steps": growth.Curve(growth.Step, "batch", (1,), base),
        "responses": growth.Curve(growth.Generation, "batch", (1,), base),
    }
    monkeypatch.setattr(growth, "FIGURES", {"tiny": growth.Figure("A title", "s", curves, 1)})
    monkeypatch.setattr(sys, "argv", ["growth.py", "--rounds", "2", "--output", str(tmp_path)])
    growth.main()
    written = json.loads((tmp_path / "growth.json").read_text())["figures"]["tiny"]
    assert {label: len(points) for label, points in written.items()} == dict.fromkeys(curves, 1)
    assert all(value > 0 for points in written.values() for value in points[0]["values"])
    assert capsys.readouterr().out.startswith("A title: steps: ")
    text = (tmp_path / "tiny.svg").read_text()
    assert all(f">{name}<" in text for name in ("A title", "steps", "responses", "in proportion"))


def test_every_figure_has_curves_over_one_size(growth):
    for figure in growth.FIGURES.values():
        assert len({(curve.axis, curve.sizes) for curve in figure.curves.values()}) == 1
        for curve in figure.curves.values():
            assert max(curve.sizes) <= growth.POSITIONS
            assert curve.axis in growth.Size._fields
