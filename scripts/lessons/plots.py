"""Plots of the lessons as text of SVG files, without a plotting package.

Each function returns the text of a file, which any browser opens.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from rlhf_jax.runtime.report.charts import nice_ticks

COLOURS = ("#2a6bdb", "#d9691a", "#14906a", "#9a48bd", "#b58900", "#c0271b", "#0e8fa8", "#5f6670")
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, BOTTOM = 66, 22, 50  # margins of a plot, in pixels; the one above holds the legend
LETTER = 6.6  # mean width of a letter of the legend, in pixels
STYLE = """
text { font: 12px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #656b73; }
.title { font-size: 15px; font-weight: 600; fill: #1d1f22; }
.strong { fill: #1d1f22; }
.grid { stroke: #e6e6e2; }
.zero { stroke: #9aa1a9; }
.dots { stroke-width: 3.2; stroke-linecap: round; opacity: 0.7; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
"""

Numbers = Sequence[float] | np.ndarray


class Line(NamedTuple):
    """A curve with an optional band.

    Attributes:
      label: the name in the legend; "" has no entry.
      xs, ys: the points.
      low, high: edges of a band at the same xs, or None.
      colour: number of the colour.
      dashed: whether the line is dashed, for known values.
      dots: whether to draw points without a line.
    """

    label: str
    xs: Numbers
    ys: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    colour: int = 0
    dashed: bool = False
    dots: bool = False


class Cell(NamedTuple):
    """A cell of a map: its large and its small text, and its darkness from 0 to 1."""

    large: str
    small: str
    shade: float


def line_plot(
    title: str,
    lines: Sequence[Line],
    *,
    labels: tuple[str, str],
    y_range: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    """The text of an SVG file with curves.

    Args:
      title: above the plot.
      lines: the curves; later ones are drawn over earlier ones.
      labels: names of the horizontal and of the vertical axis.
      y_range: limits of the vertical axis; None fits the lines.
      log: whether the vertical axis is logarithmic.
    """
    legend, top = _legend([(x.label, x.colour, x.dashed) for x in lines if x.label])
    scale: Callable[[float], float] = math.log10 if log else float
    lines = [_scaled(line, scale) for line in lines]
    x_limits = _limits([x for line in lines for x in line.xs])
    if y_range is None:
        drawn = [ys for line in lines for ys in (line.ys, line.low, line.high) if ys is not None]
        low, high = _limits([y for ys in drawn for y in ys])
        y_range = low - 0.04 * (high - low), high + 0.04 * (high - low)
    else:
        y_range = scale(y_range[0]), scale(y_range[1])
    frame = _Frame(x_limits, y_range, top)
    parts = [_text(LEFT, 22, title, "title"), legend]
    parts += _axes(frame, labels, log)
    area = f'x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - BOTTOM - top}"'
    parts.append(f'<clipPath id="area"><rect {area}/></clipPath><g clip-path="url(#area)">')
    parts += [_band(frame, line) for line in lines if line.low is not None]
    parts += [_curve(frame, line) for line in lines]
    return _file([*parts, "</g>"], HEIGHT)


def bar_plot(
    title: str, labels: Sequence[str], series: Sequence[tuple[str, Numbers]], *, note: str
) -> str:
    """The text of an SVG file with horizontal bars, one per label and series."""
    legend, top = _legend([(name, index, False) for index, (name, _) in enumerate(series)])
    thick, gap = 13, 12
    group = thick * len(series) + gap
    height = top + group * len(labels) + 46
    left = 24 + round(LETTER * max(len(label) for label in labels))
    low, high = _limits([0.0, *(value for _, values in series for value in values)])
    margin = 0.12 * (high - low)  # for the numbers beside the bars
    low, high = (low - margin if low < 0 else low), high + margin

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - RIGHT - left)

    parts = [_text(left, 22, title, "title"), legend]
    for tick in nice_ticks(low, high, 6):
        x, kind = place(tick), "zero" if tick == 0 else "grid"
        parts.append(_segment((x, top), (x, height - 46), kind))
        parts.append(_text(x, height - 30, f"{tick:g}", anchor="middle"))
    for i, label in enumerate(labels):
        y = top + gap / 2 + i * group
        middle = y + thick * len(series) / 2 + 4
        parts.append(_text(left - 10, middle, label, "strong", anchor="end"))
        for j, (_, values) in enumerate(series):
            start, end = sorted((place(0.0), place(values[i])))
            parts.append(
                f'<rect x="{start:.1f}" y="{y + j * thick:.1f}" width="{end - start:.1f}" '
                f'height="{thick - 2}" fill="{COLOURS[j]}"/>'
            )
            x, anchor = (end + 5, "start") if values[i] >= 0 else (start - 5, "end")
            parts.append(_text(x, y + j * thick + 10, f"{values[i]:.2f}", anchor=anchor))
    parts.append(_text(WIDTH - RIGHT, height - 10, note, anchor="end"))
    return _file(parts, height)


def map_plot(maps: Sequence[tuple[str, Sequence[Sequence[Cell]]]], *, note: str) -> str:
    """The text of an SVG file with maps of square cells side by side, each with its title."""
    columns = max(len(row) for _, cells in maps for row in cells)
    rows = max(len(cells) for _, cells in maps)
    across = (WIDTH - 2 * RIGHT - 24 * (len(maps) - 1)) / len(maps)
    side = across / columns
    parts = []
    for index, (title, cells) in enumerate(maps):
        left = RIGHT + index * (across + 24)
        parts.append(_text(left, 24, title, "title"))
        for i, row in enumerate(cells):
            for j, cell in enumerate(row):
                parts += _cell(left + j * side, 38 + i * side, side, cell)
    height = round(38 + rows * side + 30)
    return _file([*parts, _text(RIGHT, height - 10, note)], height)


def save(folder: Path, name: str, text: str) -> Path:
    """Writes the text of an SVG file into a folder, which is created, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.svg"
    path.write_text(text, encoding="utf-8")
    return path


class _Frame(NamedTuple):
    """The mapping from numbers to pixels."""

    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    top: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x_limits[0]) / (self.x_limits[1] - self.x_limits[0])
        up = (y - self.y_limits[0]) / (self.y_limits[1] - self.y_limits[0])
        low, high = HEIGHT - BOTTOM, self.top
        return LEFT + across * (WIDTH - LEFT - RIGHT), low + up * (high - low)


def _axes(frame: _Frame, labels: tuple[str, str], log: bool) -> list[str]:
    parts = []
    y_ticks = nice_ticks(*frame.y_limits, 5)
    if log:
        y_ticks = [tick for tick in y_ticks if tick == int(tick)]
    for tick in y_ticks:
        x, y = frame.place(frame.x_limits[0], tick)
        parts.append(_segment((x, y), (WIDTH - RIGHT, y), "zero" if tick == 0 else "grid"))
        text = f"{10**tick:g}" if log and tick > -4 else f"1e{tick:g}" if log else f"{tick:g}"
        parts.append(_text(x - 8, y + 4, text, anchor="end"))
    for tick in nice_ticks(*frame.x_limits, 7):
        x, y = frame.place(tick, frame.y_limits[0])
        parts.append(_text(x, y + 18, f"{tick:g}", anchor="middle"))
    middle = (frame.top + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 16 {middle:.1f})" text-anchor="middle"'
    parts.append(f'<text x="16" y="{middle:.1f}" {turned}>{escape(labels[1])}</text>')
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 12, labels[0], anchor="end"))
    return parts


def _legend(entries: Sequence[tuple[str, int, bool]]) -> tuple[str, float]:
    """(legend, top of the plot below it); a long legend has several lines."""
    parts, x, y = [], float(LEFT), 44.0
    for label, colour, dashed in entries:
        width = 30 + LETTER * len(label)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + 18
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        stroke = f'stroke="{COLOURS[colour]}" stroke-width="3"{dash}'
        parts.append(f'<path d="M{x:.1f} {y - 4:.1f}h16" {stroke}/>')
        parts.append(_text(x + 22, y, label, "strong"))
        x += width + 10
    return "".join(parts), y + 14 if entries else 36.0


def _band(frame: _Frame, line: Line) -> str:
    assert line.low is not None
    assert line.high is not None
    there = [frame.place(x, y) for x, y in zip(line.xs, line.high)]
    back = [frame.place(x, y) for x, y in zip(line.xs, line.low)][::-1]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in there + back)
    return f'<polygon points="{points}" fill="{COLOURS[line.colour]}" opacity="0.14"/>'


def _curve(frame: _Frame, line: Line) -> str:
    points = (frame.place(x, y) for x, y in zip(line.xs, line.ys))
    if line.dots:  # a line of length 0 is drawn as its round cap
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        return f'<path class="dots" d="{path}" stroke="{COLOURS[line.colour]}"/>'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'<path class="curve" d="{path}" stroke="{COLOURS[line.colour]}"{dash}/>'


def _cell(x: float, y: float, side: float, cell: Cell) -> list[str]:
    mix = [round(255 + cell.shade * (dark - 255)) for dark in (96, 158, 240)]
    fill = f"#{mix[0]:02x}{mix[1]:02x}{mix[2]:02x}"
    size = f'width="{side:.1f}" height="{side:.1f}"'
    return [
        f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{fill}" stroke="#ffffff" stroke-width="2"/>',
        f'<text x="{x + side / 2:.1f}" y="{y + side * 0.48:.1f}" class="strong" '
        f'style="font-size: {0.36 * side:.0f}px" text-anchor="middle">{escape(cell.large)}</text>',
        _text(x + side / 2, y + side * 0.84, cell.small, "strong", anchor="middle"),
    ]


def _scaled(line: Line, scale: Callable[[float], float]) -> Line:
    low, high = (None if ys is None else [scale(y) for y in ys] for ys in (line.low, line.high))
    return line._replace(ys=[scale(y) for y in line.ys], low=low, high=high)


def _limits(values: Numbers) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1.0, high + 1.0)


def _segment(start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" '
        f'x2="{end[0]:.1f}" y2="{end[1]:.1f}" class="{kind}"/>'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}">{escape(text)}</text>'


def _file(parts: Sequence[str], height: float) -> str:
    size = f'width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n'
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>\n'
    return head + ground + "\n".join(parts) + "\n</svg>\n"
