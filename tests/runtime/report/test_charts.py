"""The geometry of the charts: paths, gaps, smoothing and ticks."""

import json
import math
import re

import numpy as np
import pytest

from rlhf_jax.runtime.report import charts
from rlhf_jax.runtime.report.charts import Series


def coordinates(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML](\S+?) ([\d.e+-]+)", path)]


def test_a_line_goes_through_its_points():
    points = ((0.0, 1.0), (5.0, 3.0), (10.0, 2.0))
    chart = charts.chart_of("t", [Series("a", points)])
    (low, high) = json.loads(chart.data)["y"]
    assert low < 1.0 < 3.0 < high
    expected = [(100 * x, 1000 * (high - y) / (high - low)) for x, y in points]
    np.testing.assert_allclose(coordinates(chart.curves[0].path), expected, rtol=1e-3)
    for top, text in chart.y_ticks:
        np.testing.assert_allclose(top / 100, (high - float(text)) / (high - low), atol=1e-3)
    assert chart.curves[0].last == "2"


def test_gaps_single_points_and_constants_are_drawn():
    nan = math.nan
    points = ((0, 1.0), (1, nan), (2, 2.0), (3, 3.0), (4, math.inf), (5, 1.0))
    curve = charts.chart_of("t", [Series("a", points)]).curves[0]
    assert [curve.path.count(letter) for letter in "MLh"] == [1, 1, 0]
    assert [curve.lone.count(letter) for letter in "MLh"] == [2, 0, 2]
    curve = charts.chart_of("t", [Series("a", ((3, 7.0),))]).curves[0]
    assert (curve.path, curve.lone) == ("", "M500 500h0")
    assert charts.chart_of("t", [Series("a", ((0, nan),)), Series("b", ())]) is None


def test_a_long_series_stays_small_and_keeps_its_spikes():
    generator = np.random.default_rng(0)
    values = generator.normal(size=20_000)
    values[12_345] = 50.0
    points = tuple((float(i), float(v)) for i, v in enumerate(values))
    chart = charts.chart_of("t", [Series("a", points)])
    drawn = coordinates(chart.curves[0].raw)
    assert len(drawn) <= charts.MAX_POINTS
    assert min(y for _, y in drawn) < 80
    smoothed = coordinates(chart.curves[0].path)
    assert np.std([y for _, y in smoothed]) < 0.2 * np.std([y for _, y in drawn])


def test_smooth_matches_a_loop():
    values = np.random.default_rng(1).normal(size=30)
    at = np.arange(30)
    weights = np.exp(-abs(at[:, None] - at[None]) / 4.0)
    expected = (weights @ values) / weights.sum(1)
    np.testing.assert_allclose(charts.smooth(list(values), 4.0), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 17), (1e-9, 5e-9), (999_000, 1_000_000), (0.9991, 0.9994)]
)
def test_ticks_are_round_distinct_and_inside(low, high):
    ticks = charts.nice_ticks(low, high, 4)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    texts = [text for _, text in charts._ticks((low, high), flip=False, integers=False)]
    assert len(set(texts)) == len(ticks)


def test_ticks_of_steps_are_integers():
    chart = charts.chart_of("t", [Series("a", ((1.0, 1.0), (2.0, 2.0)))])
    assert [text for _, text in chart.x_ticks] == ["1", "2"]
