"""The geometry of the report's charts: numbers in, SVG paths and axis labels out.

Paths have coordinates in a square of 1000 x 1000 units, which the page stretches to its width; axis
labels are placed in percent. So lines stay sharp and text keeps its size on any screen. The
template of the report draws the charts.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence

from rlhf_jax.runtime.run.progress import short_number

Point = tuple[float, float]

SIDE = 1000.0
MAX_POINTS = 400
MAX_SMOOTH_POINTS = 160
SMOOTH_FROM = 60


@dataclasses.dataclass(frozen=True)
class Series:
    """A named sequence of points (x, y); y may be NaN or infinite, which leaves a gap.

    Attributes:
      label: the name in the legend.
      points: in the order of x, for a line.
    """

    label: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A series as drawn.

    Attributes:
      label: the name in the legend.
      last: the last finite value, as text.
      path: the main line (or the dots), an SVG path in the square of `SIDE`.
      raw: the unsmoothed values behind a smoothed main line, else "".
      trend: the smoothed line through dots, else "".
      lone: dots where a line has a point between gaps, else "".
    """

    label: str
    last: str
    path: str
    raw: str = ""
    trend: str = ""
    lone: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart as the template draws it.

    Attributes:
      title: of the chart.
      note: unit or explanation, one line.
      curves: the lines, in the order of their colours.
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
    dots: bool = False


def line_chart(
    title: str, series: Sequence[Series], *, note: str = "", x_label: str = "step"
) -> Chart | None:
    """Lines; a long one is smoothed, with the raw values faintly behind.

    None if there is no finite point.
    """
    return _chart(title, series, note, x_label, dots=False)


def dot_chart(
    title: str, series: Sequence[Series], *, note: str = "", x_label: str = ""
) -> Chart | None:
    """Dots, each series with a smoothed line through it; None if there is no finite point."""
    return _chart(title, series, note, x_label, dots=True)


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


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points, with spikes: the lowest and the highest of each equal run.

    >>> thin([(x, 5.0 if x == 7 else 0.0) for x in range(10)], 4)
    [(0, 0.0), (1, 0.0), (5, 0.0), (7, 5.0)]
    """
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        extremes = {min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])}
        if len(extremes) == 1:  # a flat run: its two first points keep the count even
            extremes = set(run[:2])
        kept += sorted(extremes)
    return kept


def _chart(
    title: str, series: Sequence[Series], note: str, x_label: str, *, dots: bool
) -> Chart | None:
    finite = [
        dataclasses.replace(s, points=tuple(p for p in s.points if _finite(p))) for s in series
    ]
    shown = [(s, f) for s, f in zip(series, finite) if f.points]
    if not shown:
        return None
    x_range = _padded([x for _, f in shown for x, _ in f.points], 0.03 if dots else 0.0)
    y_range = _padded([y for _, f in shown for _, y in f.points], 0.06)
    data = {
        "x": x_range,
        "y": y_range,
        "series": [
            {"label": s.label, "points": [_rounded(p) for p in thin(f.points)]} for s, f in shown
        ],
    }
    return Chart(
        title=title,
        note=note,
        curves=tuple(_curve(s, f, x_range, y_range, dots) for s, f in shown),
        x_ticks=_ticks(x_range, flip=False, integers=x_label == "step"),
        y_ticks=_ticks(y_range, flip=True, integers=False),
        x_label=x_label,
        data=json.dumps(data, separators=(",", ":")),
        dots=dots,
    )


def _curve(series: Series, finite: Series, x_range: Point, y_range: Point, dots: bool) -> Curve:
    last = short_number(finite.points[-1][1])
    span = max(1.5, len(finite.points) / 40)
    if dots:
        ordered = sorted(finite.points)
        trend = ""
        if len(ordered) >= 8:
            trend = _line(_smooth_line(ordered, 2 * span), x_range, y_range)
        return Curve(series.label, last, _dots(thin(ordered), x_range, y_range), trend=trend)
    if len(finite.points) < SMOOTH_FROM:
        lone = [run[0] for run in _runs(series.points) if len(run) == 1]
        path, alone = _line(series.points, x_range, y_range), _dots(lone, x_range, y_range)
        return Curve(series.label, last, path, lone=alone)
    main = _line(_smooth_line(finite.points, span), x_range, y_range)
    return Curve(series.label, last, main, raw=_line(thin(finite.points), x_range, y_range))


def _smooth_line(points: Sequence[Point], span: float) -> list[Point]:
    means = smooth([y for _, y in points], span)
    return thin([(x, mean) for (x, _), mean in zip(points, means)], MAX_SMOOTH_POINTS)


def _decayed(values: Sequence[float], span: float) -> list[Point]:
    """Sums of the values and of their weights, exp(-age / span), up to each position."""
    decay, total, weight, sums = math.exp(-1.0 / span), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        sums.append((total, weight))
    return sums


def _line(points: Sequence[Point], x_range: Point, y_range: Point) -> str:
    """An SVG path through the points, with gaps where one is not finite."""
    runs = [run for run in _runs(points) if len(run) > 1]
    places = ([_place(point, x_range, y_range) for point in run] for run in runs)
    return "".join("M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in run) for run in places)


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """The finite points, split where one is not finite."""
    groups = itertools.groupby(points, key=_finite)
    return [list(run) for finite, run in groups if finite]


def _dots(points: Sequence[Point], x_range: Point, y_range: Point) -> str:
    """Lines of no length: with round caps they are dots, which stretching does not distort."""
    places = (_place(point, x_range, y_range) for point in points)
    return "".join(f"M{x:.4g} {y:.4g}h0" for x, y in places)


def _place(point: Point, x_range: Point, y_range: Point) -> Point:
    x = (point[0] - x_range[0]) / (x_range[1] - x_range[0])
    y = (point[1] - y_range[0]) / (y_range[1] - y_range[0])
    return SIDE * x, SIDE * (1 - y)


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


def _finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _rounded(point: Point) -> list[float]:
    return [float(f"{point[0]:.7g}"), float(f"{point[1]:.5g}")]
