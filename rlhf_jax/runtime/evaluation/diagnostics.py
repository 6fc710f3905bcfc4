"""Calibration and length bias of a reward model, and intervals of means: functions of NumPy arrays.

A pair is two responses to one prompt, the preferred one first. `differences` float[N] are score of
the preferred response minus score of the other, `length_differences` int[N] likewise their lengths
in tokens. In a ranking every two responses are a pair. A tie counts half in a share of wins, and as
an error in an accuracy.
"""

from typing import NamedTuple

import numpy as np

MAX_RESAMPLED = 2**22  # counts that the bootstrap draws at a time


class CalibrationBin(NamedTuple):
    """Pairs with similar confidence.

    Attributes:
      low, high: the range [low, high) of confidence; the last bin includes 1.
      num_pairs: pairs in it, at least one.
      confidence: their mean confidence.
      correct: the share of them whose preferred response scores higher.
    """

    low: float
    high: float
    num_pairs: int
    confidence: float
    correct: float


class LengthBin(NamedTuple):
    """Pairs with a similar difference in length.

    Attributes:
      low, high: the closed range of `length_differences`.
      num_pairs: pairs in it, at least one.
      length_difference: their mean difference.
      accuracy: the share of them whose preferred response scores higher.
    """

    low: int
    high: int
    num_pairs: int
    length_difference: float
    accuracy: float


def calibration(differences: np.ndarray, bins: int = 10) -> list[CalibrationBin]:
    """The reliability curve: the share of correct pairs by confidence.

        confidence = sigmoid(|difference|),     from 1/2 to 1

    This is the probability by Bradley and Terry's model, whose likelihood the losses of reward
    models maximize, that the response with the higher score is better. The bins divide its range
    evenly; empty ones are left out. A tie counts half.

    Guo et al., On Calibration of Modern Neural Networks, section 2 (arXiv:1706.04599).

    >>> calibration(np.array([0.0, 2.0, 2.0, -2.0]), bins=2)[1].correct
    0.6666666666666666
    """
    differences = np.asarray(differences, np.float64)
    confidence, correct = 1.0 / (1.0 + np.exp(-np.abs(differences))), _share_won(differences)
    edges = np.linspace(0.5, 1.0, bins + 1)
    places = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, bins - 1)
    curve = []
    for place in np.unique(places).tolist():
        inside = places == place
        bounds = float(edges[place]), float(edges[place + 1])
        means = float(confidence[inside].mean()), float(correct[inside].mean())
        curve.append(CalibrationBin(*bounds, int(inside.sum()), *means))
    return curve


def expected_calibration_error(curve: list[CalibrationBin]) -> float:
    """Mean distance of the reliability curve from the diagonal, weighted by the pairs of the bins.

        sum_b n_b / N * |correct_b - confidence_b|

    Guo et al., eq. 3 (arXiv:1706.04599). 0 for an empty curve.

    >>> expected_calibration_error([CalibrationBin(0.5, 1.0, 4, 0.75, 0.5)])
    0.25
    """
    total = sum(each.num_pairs for each in curve)
    gaps = (each.num_pairs * abs(each.correct - each.confidence) for each in curve)
    return float(sum(gaps)) / max(total, 1)


def accuracy_by_length(
    differences: np.ndarray, length_differences: np.ndarray, bins_a_side: int = 4
) -> list[LengthBin]:
    """Accuracy by the length of the preferred response minus that of the other.

    The bins are symmetric: their bounds are quantiles of |length difference| on either side, and
    pairs of equal length are a bin of their own. Empty ones are left out. A model that prefers the
    longer response has a high accuracy in the bins above 0 and a low one in those below.

    >>> [(b.low, b.high, b.accuracy)
    ...  for b in accuracy_by_length(np.array([1.0, -1.0, 1.0]), np.array([-2, 0, 5]), 2)]
    [(-2, -1, 1.0), (0, 0, 0.0), (3, 5, 1.0)]
    """
    lengths, correct = np.asarray(length_differences), np.asarray(differences) > 0
    bins = []
    for low, high in _length_ranges(np.abs(lengths[lengths != 0]), bins_a_side):
        inside = (low <= lengths) & (lengths <= high)
        if inside.any():
            means = float(lengths[inside].mean()), float(correct[inside].mean())
            bins.append(LengthBin(low, high, int(inside.sum()), *means))
    return bins


def _length_ranges(magnitudes: np.ndarray, bins: int) -> list[tuple[int, int]]:
    """Closed ranges of integers, symmetric about (0, 0), that together cover +-magnitudes."""
    highs: list[int] = []
    if magnitudes.size:
        quantiles = np.arange(1, bins + 1) / bins
        bounds = np.quantile(magnitudes, quantiles, method="inverted_cdf")
        highs = np.unique(bounds).astype(int).tolist()
    lows = [1, *(high + 1 for high in highs[:-1])]
    longer = list(zip(lows, highs, strict=False))
    return [*((-high, -low) for low, high in reversed(longer)), (0, 0), *longer]


def pair_metrics(
    differences: np.ndarray, length_differences: np.ndarray, margins: np.ndarray | float = 0.0
) -> dict[str, float]:
    """The scalar metrics of N pairs, N at least 1.

    A model has a length bias if `prefers_longer` is far above `longer_wins`.

    Returns:
      `loss` (the mean of -log sigmoid(difference - margin), in nats), `accuracy`, `margin` (the
      mean difference), `calibration_error`, `longer_wins` (the accuracy of the rule that the longer
      response is preferred). If lengths differ, `prefers_longer`: the share of pairs of unequal
      length in which the model scores the longer response higher. `accuracy_where_longer` and
      `accuracy_where_shorter`, over the pairs whose preferred response is the longer or the shorter
      one, if there are such pairs.

    >>> print(pair_metrics(np.array([1.0, -1.0]), np.array([0, 0]))["accuracy"])
    0.5
    """
    differences = np.asarray(differences, np.float64)
    lengths = np.asarray(length_differences)
    correct, unequal = differences > 0, lengths != 0
    metrics = {
        "loss": np.logaddexp(0.0, margins - differences).mean(),
        "accuracy": correct.mean(),
        "margin": differences.mean(),
        "calibration_error": expected_calibration_error(calibration(differences)),
        "longer_wins": _share_won(lengths).mean(),
    }
    if unequal.any():
        metrics["prefers_longer"] = _share_won((differences * np.sign(lengths))[unequal]).mean()
    for name, inside in (("longer", lengths > 0), ("shorter", lengths < 0)):
        if inside.any():
            metrics[f"accuracy_where_{name}"] = correct[inside].mean()
    return {name: float(value) for name, value in metrics.items()}


def _share_won(values: np.ndarray) -> np.ndarray:
    """float64[N]: 1 above 0, 0 below, and 1/2 for a tie."""
    return (values > 0) + 0.5 * (values == 0)


def with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean of float[N] values by that name, and the bounds of its 95 % bootstrap interval."""
    low, high = bootstrap_interval(values)
    return {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over prompts or pairs.

    N of the float[N] values are drawn with replacement, `num_resamples` times; (low, high) are the
    (1 - level) / 2 and the (1 + level) / 2 quantile of their means. The interval covers the choice
    of the prompts, not the sampling of the responses. With few values it is too narrow, and of
    equal values it has no width.

    Efron, Bootstrap Methods: Another Look at the Jackknife (1979).

    >>> bootstrap_interval(np.array([1.0, 0.0, 1.0, 1.0]), num_resamples=1000)
    (0.25, 1.0)
    """
    # Wins have few different values: to draw the count of each costs far less than to draw each.
    different, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    rng, total = np.random.default_rng(seed), int(counts.sum())
    block = max(1, MAX_RESAMPLED // len(different))
    sizes = [min(block, num_resamples - start) for start in range(0, num_resamples, block)]
    drawn = (rng.multinomial(total, counts / total, size=size) for size in sizes)
    averages = np.concatenate([times @ different for times in drawn]) / total
    low, high = np.quantile(averages, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
