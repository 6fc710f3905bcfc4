"""Values of JSON as numbers and as text for people."""

import json
import math
from typing import Any

from etils import epath

from rlhf_jax.runtime.run.progress import short_number


def file_text(path: epath.Path) -> str:
    """The text of a file, "" without one; bytes that are not UTF-8 are replacement characters."""
    return path.read_bytes().decode("utf-8", "replace") if path.exists() else ""


def number(value: Any) -> float | None:
    """A JSON value as a float, including the strings for NaN and infinities, or None."""
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:  # an integer beyond floats
            return math.inf if value > 0 else -math.inf
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def text(value: Any) -> str:
    """A string as it is, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short(value: Any) -> str:
    """Four significant digits of a number, "–" for None."""
    x = number(value)
    if x is None:
        return "–" if value is None else text(value)
    if math.isfinite(x) and abs(x) >= 10_000:
        return short_number(x)
    return f"{round(x, 4):.4g}" if abs(x) >= 1e-3 else f"{x:.2g}"


def brief(value: Any) -> str:
    """A number of a sample: two decimals."""
    x = number(value)
    return short(value) if x is None or abs(x) >= 1e3 else f"{x:.2f}"


def change(before: float, after: float) -> str:
    """The signed difference."""
    difference = short(after - before)
    has_sign = difference.startswith("-") or difference in ("0", "nan")
    return difference if has_sign else f"+{difference}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours.

    >>> duration(75), duration(600), duration(7200)
    ('75 s', '10 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
