"""Metrics of several runs that differ in their seeds: their names, their means and their spread."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_NAME = re.compile(r"seed_(\d+)/(.+)")

Points = Sequence[tuple[float, float]]


class Spread(NamedTuple):
    """What several seeds gave for one metric.

    Attributes:
      band: (step, mean - deviation, mean + deviation), at the steps that at least two seeds have.
      deviation: the last of these deviations; NaN if there is none.
    """

    band: tuple[tuple[float, float, float], ...]
    deviation: float


def with_means(seeds: Sequence[int], metrics: Mapping[str, Any]) -> dict[str, float]:
    """The mean of each metric over the seeds, and each seed's own value as `seed_3/NAME`.

    Args:
      metrics: name -> [N] values, in the order of the seeds.

    >>> with_means([0, 1], {"objective/kl": [1.0, 4.0]})
    {'objective/kl': 2.5, 'seed_0/objective/kl': 1.0, 'seed_1/objective/kl': 4.0}
    """
    means = {name: float(np.mean(np.asarray(x, np.float64))) for name, x in metrics.items()}
    of_seeds = {
        f"seed_{seed}/{name}": float(values[place])
        for place, seed in enumerate(seeds)
        for name, values in metrics.items()
    }
    return means | of_seeds


def seeds_of(names: Iterable[str]) -> list[int]:
    """The seeds that metrics of such names are of.

    >>> seeds_of(["objective/kl", "seed_1/objective/kl", "seed_0/objective/kl"])
    [0, 1]
    """
    found = (_NAME.fullmatch(name) for name in names)
    return sorted({int(match[1]) for match in found if match is not None})


def split_seeds(
    series: Mapping[str, Points],
) -> tuple[dict[str, Points], dict[str, Spread]]:
    """(the series that are no seed's own, the spread over the seeds of each metric).

        deviation = sqrt(sum (x - mean)^2 / (N - 1)), N seeds

    Args:
      series: name -> points (step, value); those of the form `seed_3/NAME` are the seeds' own.
    """
    shared: dict[str, Points] = {}
    values: dict[str, dict[float, list[float]]] = {}
    for name, points in series.items():
        found = _NAME.fullmatch(name)
        if found is None:
            shared[name] = points
            continue
        by_step = values.setdefault(found[2], {})
        for step, value in points:
            by_step.setdefault(step, []).append(value)
    return shared, {name: _spread(by_step) for name, by_step in values.items()}


def _spread(by_step: Mapping[float, Sequence[float]]) -> Spread:
    band, deviation = [], math.nan
    for step, values in sorted(by_step.items()):
        if len(values) > 1 and all(map(math.isfinite, values)):
            mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
            band.append((step, mean - deviation, mean + deviation))
    return Spread(tuple(band), deviation)
