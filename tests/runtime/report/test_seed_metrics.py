"""Several seeds: what their metrics are called, and what the report makes of them."""

import json
import math
import re

import numpy as np
import pytest

from rlhf_jax.runtime.report import charts
from rlhf_jax.runtime.report import page as report
from rlhf_jax.runtime.report.charts import Series
from rlhf_jax.runtime.report.seed_metrics import split_seeds, with_means


def test_means_and_seeds_are_told_apart_again():
    rows = [
        {"step": step, "time": step, **with_means([3, 4, 11], {"objective/kl": values})}
        for step, values in enumerate([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]], start=1)
    ]
    assert rows[0]["objective/kl"] == 3.0
    assert rows[0]["seed_11/objective/kl"] == 6.0
    shared, spreads = split_seeds(report._series(rows))
    assert shared == {"objective/kl": [(1.0, 3.0), (2.0, 0.5)]}
    deviation = math.sqrt((2**2 + 1**2 + 3**2) / 2)
    np.testing.assert_allclose(spreads["objective/kl"].band[0], (1, 3 - deviation, 3 + deviation))
    np.testing.assert_allclose(spreads["objective/kl"].band[1], (2, 0.5, 0.5))
    assert spreads["objective/kl"].deviation == 0


def test_a_step_that_one_seed_alone_has_or_that_is_not_finite_has_no_spread():
    series = {
        "seed_0/loss": [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)],
        "seed_1/loss": [(1.0, 2.0), (3.0, math.nan)],
    }
    shared, spreads = split_seeds(series)
    assert shared == {}
    assert [step for step, *_ in spreads["loss"].band] == [1.0]
    lonely = split_seeds({"seed_0/loss": [(1.0, 1.0)]})[1]["loss"]
    assert lonely.band == ()
    assert math.isnan(lonely.deviation)


@pytest.mark.parametrize("count", [3, 100])
def test_the_band_surrounds_the_line(count):
    points = tuple((float(x), math.sin(x / 9)) for x in range(count))
    band = tuple((x, y - 0.5, y + 0.25) for x, y in points)
    chart = charts.line_chart("t", [Series("a", points, band)])
    low, high = json.loads(chart.data)["y"]
    assert low < min(y for _, y, _ in band)
    assert high > max(y for _, _, y in band)
    (curve,) = chart.curves
    assert curve.band.endswith("Z")
    assert curve.band.count("M") == 1
    corners = [
        tuple(map(float, pair)) for pair in re.findall(r"[ML](\S+?) ([\d.e+-]+)", curve.band)
    ]
    line = [tuple(map(float, pair)) for pair in re.findall(r"[ML](\S+?) ([\d.e+-]+)", curve.path)]
    # Heights count downwards: at the left end the upper edge comes first, the lower one last.
    unit = 1000 / (high - low)
    np.testing.assert_allclose(corners[0], (0, line[0][1] - 0.25 * unit), rtol=2e-3, atol=0.1)
    np.testing.assert_allclose(corners[-1], (0, line[0][1] + 0.5 * unit), rtol=2e-3, atol=0.1)


def test_the_report_shows_the_mean_its_spread_and_no_chart_of_a_seed(tmp_path):
    rows = [
        {"step": step, "time": step, **with_means([0, 1], {"objective/scores": [step, step + 2.0]})}
        for step in range(1, 6)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report.write_report(tmp_path).read_text()
    assert page.count('class="band"') == 1
    assert "seed_0" not in page
    assert "6 ± 1.414" in page
    assert "mean of 2 seeds, ± one standard deviation" in page
