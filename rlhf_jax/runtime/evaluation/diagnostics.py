"""How far the scores of a reward model can be trusted: functions of NumPy arrays over pairs.

A pair is two responses to one prompt, of which the first was preferred. `differences` float[N] are
score of the preferred response minus score of the other, `length_differences` int[N] likewise their
lengths in tokens. Of rankings every two responses are a pair. Where a share asks which of two sides
wins, a tie counts half; in an accuracy it is no hit.
"""

from typing import NamedTuple

import numpy as np


class CalibrationBin(NamedTuple):
    """Pairs of like confidence.

    Attributes:
      low, high: the range of confidence; the upper end belongs to the next bin, but for 1.
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
    """Pairs of like difference in length.

    Attributes:
      low, high: the range of `length_differences`, both ends in it.
      num_pairs: pairs in it, at least one.
      length_difference: their mean difference.
      accuracy: the share of them whose preferred response scores higher.
    """

    low: int
    high: int
    num_pairs: int
    length_difference: float
    accuracy: float


def confidences(differences: np.ndarray) -> np.ndarray:
    """float64[N], the probability that the model gives to the response that it scores higher.

        sigmoid(|difference|),     from 1/2 to 1

    Bradley and Terry's model, which the losses of reward models are the likelihood of.

    >>> print(confidences(np.array([0.0, np.log(3.0), -np.log(3.0)])))
    [0.5  0.75 0.75]
    """
    return 1.0 / (1.0 + np.exp(-np.abs(np.asarray(differences, np.float64))))


def calibration(differences: np.ndarray, bins: int = 10) -> list[CalibrationBin]:
    """The reliability curve: how often the model is right where it is so and so sure.

    The bins divide the confidence, from 1/2 to 1, evenly; empty ones are left out. A pair put the
    other way round is the same pair here, so that it does not matter that the preferred response
    always comes first. A tie, of confidence 1/2, is half right.

    Guo et al., On Calibration of Modern Neural Networks, section 2 (arXiv:1706.04599).

    >>> calibration(np.array([0.0, 2.0, 2.0, -2.0]), bins=2)[1].correct
    0.6666666666666666
    """
    differences = np.asarray(differences, np.float64)
    confidence, correct = confidences(differences), _share_won(differences)
    edges = np.linspace(0.5, 1.0, bins + 1)
    places = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, bins - 1)
    found = []
    for place in np.unique(places).tolist():
        inside = places == place
        ends = float(edges[place]), float(edges[place + 1])
        means = float(confidence[inside].mean()), float(correct[inside].mean())
        found.append(CalibrationBin(*ends, int(inside.sum()), *means))
    return found


def expected_calibration_error(curve: list[CalibrationBin]) -> float:
    """Mean distance of the reliability curve from the diagonal, bins weighted by their pairs.

        sum_b n_b / N * |correct_b - confidence_b|

    Guo et al., eq. 3 (arXiv:1706.04599). 0 of an empty curve.

    >>> expected_calibration_error([CalibrationBin(0.5, 1.0, 4, 0.75, 0.5)])
    0.25
    """
    total = sum(each.num_pairs for each in curve)
    gaps = (each.num_pairs * abs(each.correct - each.confidence) for each in curve)
    return float(sum(gaps)) / max(total, 1)


def accuracy_by_length(
    differences: np.ndarray, length_differences: np.ndarray, bins_a_side: int = 4
) -> list[LengthBin]:
    """Accuracy where the preferred response is so and so much longer or shorter than the other.

    The bins are symmetric: their ends are quantiles of |length difference| on either side, and
    pairs of equal length are a bin of their own. Empty ones are left out. A model that has learned
    that longer is better is right in those on the right, and wrong in those on the left.

    >>> [(b.low, b.high, b.accuracy)
    ...  for b in accuracy_by_length(np.array([1.0, -1.0, 1.0]), np.array([-2, 0, 5]), 2)]
    [(-2, -1, 1.0), (0, 0, 0.0), (3, 5, 1.0)]
    """
    lengths = np.asarray(length_differences)
    right = np.asarray(differences) > 0
    found = []
    for low, high in _length_ranges(np.abs(lengths[lengths != 0]), bins_a_side):
        inside = (low <= lengths) & (lengths <= high)
        if inside.any():
            means = float(lengths[inside].mean()), float(right[inside].mean())
            found.append(LengthBin(low, high, int(inside.sum()), *means))
    return found


def longer_wins(length_differences: np.ndarray) -> float:
    """Accuracy of the rule that the longer response is preferred; of equal ones it is half right.

    >>> longer_wins(np.array([4, 2, -1, 0]))
    0.625
    """
    return float(_share_won(np.asarray(length_differences)).mean())


def prefers_longer(differences: np.ndarray, length_differences: np.ndarray) -> float | None:
    """The share of pairs in which the model scores the longer response higher.

    It is a length shortcut where this is far above `longer_wins`, which says how often the longer
    response really is the preferred one. Pairs of equal length are not counted; None if all are.

    >>> prefers_longer(np.array([1.0, -1.0, 1.0, 2.0]), np.array([4, -2, -1, 0]))
    0.6666666666666666
    """
    lengths = np.asarray(length_differences)
    unequal = lengths != 0
    if not unequal.any():
        return None
    towards_longer = np.asarray(differences)[unequal] * np.sign(lengths[unequal])
    return float(_share_won(towards_longer).mean())


def pair_metrics(
    differences: np.ndarray, length_differences: np.ndarray, margins: np.ndarray | float = 0.0
) -> dict[str, float]:
    """All that is one number, over at least one pair.

    Returns:
      `loss` (the mean of -log sigmoid(difference - margin), in nats), `accuracy`, `margin` (the
      mean difference), `calibration_error`, `longer_wins`, and where lengths differ
      `prefers_longer`; where there are such pairs, `accuracy_where_longer` and
      `accuracy_where_shorter`, of those whose preferred response is the longer or shorter one.

    >>> print(pair_metrics(np.array([1.0, -1.0]), np.array([0, 0]))["accuracy"])
    0.5
    """
    differences = np.asarray(differences, np.float64)
    lengths = np.asarray(length_differences)
    right = differences > 0
    metrics = {
        "loss": float(np.logaddexp(0.0, margins - differences).mean()),
        "accuracy": float(right.mean()),
        "margin": float(differences.mean()),
        "calibration_error": expected_calibration_error(calibration(differences)),
        "longer_wins": longer_wins(lengths),
    }
    preference = prefers_longer(differences, lengths)
    if preference is not None:
        metrics["prefers_longer"] = preference
    for name, inside in (("longer", lengths > 0), ("shorter", lengths < 0)):
        if inside.any():
            metrics[f"accuracy_where_{name}"] = float(right[inside].mean())
    return metrics


def _share_won(values: np.ndarray) -> np.ndarray:
    """float64[N]: 1 above 0, 0 below, and 1/2 for a tie."""
    return (values > 0) + 0.5 * (values == 0)


def _length_ranges(magnitudes: np.ndarray, bins: int) -> list[tuple[int, int]]:
    """Closed ranges of whole numbers, symmetric about (0, 0), that together hold +-magnitudes."""
    highs: list[int] = []
    if magnitudes.size:
        quantiles = np.arange(1, bins + 1) / bins
        ends = np.quantile(magnitudes, quantiles, method="inverted_cdf")
        highs = np.unique(ends).astype(int).tolist()
    lows = [1, *(high + 1 for high in highs[:-1])]
    longer = list(zip(lows, highs, strict=False))
    return [*((-high, -low) for low, high in reversed(longer)), (0, 0), *longer]
