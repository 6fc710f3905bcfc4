"""The geometry of the report's charts: numbers in, SVG paths and axis labels out.

Paths have coordinates in a square of 1000 x 1000 units, which the page stretches to its width; axis
labels are placed in percent. So lines stay sharp and text keeps its size on any screen.
"""

import functools
import itertools
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_jax.runtime.run.progress import short_number

Point = tuple[float, float]

SIDE = 1000.0
MAX_POINTS = 400
MAX_SMOOTH_POINTS = 160
SMOOTH_FROM = 60


class Series(NamedTuple):
    """A named sequence of points (x, y); y may be NaN or infinite, which leaves a gap.

    Attributes:
      label: in the legend.
      points: in the order of x, for a line.
      last: the value in the legend; None: that of the last finite point.
      colour: its number; None: the place among the series of the chart.
    """

    label: str
    points: Sequence[Point]
    last: str | None = None
    colour: int | None = None


class Curve(NamedTuple):
    """A series as drawn, of SVG paths in the square of `SIDE`; "" where one is not drawn.

    Attributes:
      label, last, colour: name, value and number of the colour in the legend.
      path: the main line, or the dots.
      raw: the values behind a smoothed main line.
      trend: the smoothed line through dots.
      lone: dots where a line has a point between gaps.
    """

    label: str
    last: str
    colour: int
    path: str
    raw: str = ""
    trend: str = ""
    lone: str = ""


class Chart(NamedTuple):
    """A chart as the template draws it.

    Attributes:
      title: of the chart.
      note: unit or explanation, one line.
      curves: the lines, or dots.
      x_ticks, y_ticks: (percent from the left or the top, text).
      x_label: the name of the horizontal axis.
      data: JSON for the tooltip: `x` and `y` ranges and the points of each series.
      dots: draw `path` as dots rather than as a line.
    """

    title: str
    note: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_label: str
    data: str
    dots: bool


def chart_of(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    x_label: str = "step",
    dots: bool = False,
) -> Chart | None:
    """Lines, a long one smoothed with the raw values faintly behind; None without a finite point.

    Args:
      title, note, x_label: as in `Chart`.
      series: those without a finite point are left out.
      dots: dots with a smoothed line through them.
    """
    finite = [[point for point in each.points if _is_finite(point)] for each in series]
    shown = [
        (each._replace(colour=place if each.colour is None else each.colour), points)
        for place, (each, points) in enumerate(zip(series, finite, strict=True))
        if points
    ]
    if not shown:
        return None
    x_range = _padded([x for _, points in shown for x, _ in points], 0.03 if dots else 0.0)
    y_range = _padded([y for _, points in shown for _, y in points], 0.06)
    data = {
        "x": x_range,
        "y": y_range,
        "series": [
            {
                "label": each.label,
                "colour": (each.colour or 0) % 8,
                "points": _rounded(thin(points)),
            }
            for each, points in shown
        ],
    }
    return Chart(
        title=title,
        note=note,
        curves=tuple(_curve(each, x_range, y_range, dots) for each, _ in shown),
        x_ticks=_ticks(x_range, flip=False, integers=x_label == "step"),
        y_ticks=_ticks(y_range, flip=True, integers=False),
        x_label=x_label,
        data=json.dumps(data, separators=(",", ":")),
        dots=dots,
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2, 2.5, 5 times a power of ten) within [low, high].

    >>> nice_ticks(0.13, 0.94, 4)
    [0.2, 0.4, 0.6, 0.8]
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = 3 - math.floor(math.log10(step))
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """The exponentially weighted mean over both sides of each value, which has no lag.

        m_t = sum_i exp(-|t - i| / span) x_i / sum_i exp(-|t - i| / span)

    >>> smooth([2.0, 2.0, 2.0], 10.0)
    [2.0, 2.0, 2.0]
    """
    before, after = _decayed(values, span), _decayed(values[::-1], span)[::-1]
    return [(a + b - x) / (m + n - 1.0) for (a, m), (b, n), x in zip(before, after, values)]


def _decayed(values: Sequence[float], span: float) -> list[Point]:
    """Sums of the values and of their weights, exp(-age / span), up to each position."""
    decay, total, weight, sums = math.exp(-1.0 / span), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        sums.append((total, weight))
    return sums


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points, with spikes: the lowest and the highest of each equal run.

    >>> thin([(x, 5.0 if x == 7 else 0.0) for x in range(10)], 4)
    [(0, 0.0), (5, 0.0), (7, 5.0)]
    """
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        kept += sorted({min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])})
    return kept


def _curve(series: Series, x_range: Point, y_range: Point, dots: bool) -> Curve:
    placed = [_place(point, x_range, y_range) for point in series.points]
    points = [point for point in placed if _is_finite(point)]
    last = series.last
    if last is None:
        last = short_number([point for point in series.points if _is_finite(point)][-1][1])
    curve = functools.partial(Curve, series.label, last, series.colour or 0)
    span = max(1.5, len(points) / 40)
    if dots:
        points.sort()
        trend = _line(_smoothed(points, 2 * span)) if len(points) >= 8 else ""
        return curve(_dots(thin(points)), trend=trend)
    if len(points) < SMOOTH_FROM:
        lone = [run[0] for run in _runs(placed) if len(run) == 1]
        return curve(_line(placed), lone=_dots(lone))
    return curve(_line(_smoothed(points, span)), raw=_line(thin(points)))


def _place(point: Point, x_range: Point, y_range: Point) -> Point:
    x = (point[0] - x_range[0]) / (x_range[1] - x_range[0])
    y = (point[1] - y_range[0]) / (y_range[1] - y_range[0])
    return SIDE * x, SIDE * (1 - y)


def _smoothed(points: Sequence[Point], span: float) -> list[Point]:
    means = smooth([y for _, y in points], span)
    return thin([(x, mean) for (x, _), mean in zip(points, means)], MAX_SMOOTH_POINTS)


def _line(points: Sequence[Point]) -> str:
    """An SVG path through the points, with gaps where one is not finite."""
    runs = (run for run in _runs(points) if len(run) > 1)
    return "".join("M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in run) for run in runs)


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """The finite points, split where one is not finite."""
    groups = itertools.groupby(points, key=_is_finite)
    return [list(run) for finite, run in groups if finite]


def _dots(points: Sequence[Point]) -> str:
    """Lines of no length: with round caps they are dots, which stretching does not distort."""
    return "".join(f"M{x:.4g} {y:.4g}h0" for x, y in points)


def _ticks(bounds: Point, *, flip: bool, integers: bool) -> tuple[tuple[float, str], ...]:
    values = [v for v in nice_ticks(*bounds, 4) if not integers or v == int(v)]
    # Close numbers far from zero (0.9991, 0.9992) need more digits than three to differ.
    texts = [short_number(v) for v in values]
    if len(set(texts)) < len(texts):
        texts = [f"{v:.6g}" for v in values]
    shares = [(v - bounds[0]) / (bounds[1] - bounds[0]) for v in values]
    return tuple((round(100 * (1 - s if flip else s), 2), text) for s, text in zip(shares, texts))


def _padded(values: Sequence[float], share: float) -> Point:
    low, high = min(values), max(values)
    room = share * (high - low)
    if high == low:  # a constant still needs a height
        room = 0.1 * abs(low) or 1.0
    return low - room, high + room


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _rounded(points: Sequence[Point]) -> list[Point]:
    return [(float(f"{x:.7g}"), float(f"{y:.5g}")) for x, y in points]
