"""Best-of-n sampling: the mean score of the best of n responses by the score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def best_of_means(proxy: np.ndarray, scores: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Mean score of the best of n responses, by the proxy score, for several n at once.

    The mean over all subsets of n of the K responses to a prompt, and over prompts: an unbiased
    estimate for n fresh responses. If c(v) of the K proxy scores are at most v, the best of a
    subset is at most v in C(c(v), n) of C(K, n) subsets, so that each of m responses with proxy
    score v is chosen with probability

        w(v) = (C(c(v), n) - C(c(v) - m, n)) / (m C(K, n))

    which shares ties equally.

    Args:
      proxy: float[N, K], the score by which the best response is chosen.
      scores: float[N, K], the score that is averaged: the proxy score itself, or a gold score.
      sizes: each n from 1 to K.

    Returns:
      float64[len(sizes)].

    Nakano et al., WebGPT, appendix I (arXiv:2112.09332), there without ties.

    >>> proxy, gold = np.array([[0.1, 0.7, 0.4]]), np.array([[1.0, 2.0, 6.0]])
    >>> best_of_means(proxy, gold, [1, 2, 3]).round(4).tolist()
    [3.0, 3.3333, 2.0]
    """
    proxy, scores = np.asarray(proxy, np.float64), np.asarray(scores, np.float64)
    compared = proxy[:, :, None], proxy[:, None, :]
    up_to, below = np.sum(compared[0] >= compared[1], 2), np.sum(compared[0] > compared[1], 2)
    count, means = proxy.shape[1], []
    for size in sizes:
        # The share of the subsets of this size that lie within the first c responses.
        share = np.array([math.comb(c, size) / math.comb(count, size) for c in range(count + 1)])
        weights = (share[up_to] - share[below]) / (up_to - below)
        means.append(np.mean(np.sum(weights * scores, axis=1)))
    return np.asarray(means)


def best_of_kl(n: int) -> float:
    """An upper bound of the KL of best-of-n to the policy it samples from, in nats per response.

        log n - (n - 1) / n

    Stiennon et al., Learning to Summarize from Human Feedback, appendix G.3 (arXiv:2009.01325).
    Nearly exact where each single response is improbable (Beirami et al., Theoretical Guarantees on
    the Best-of-n Alignment Policy, arXiv:2401.01879).

    >>> print(best_of_kl(1), round(best_of_kl(16), 3))
    0.0 1.835
    """
    return math.log(n) - (n - 1) / n


def best_of_curve(
    scores: np.ndarray, gold: np.ndarray | None, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Entries {"n", "kl", "scores"} and, with a gold score, "gold", in the order of n.

    Args:
      scores: float[N, K], by which the best response is chosen.
      gold: float[N, K], or None.
      sizes: each n from 1 to K.
    """
    ordered = sorted(set(sizes))
    curve = [{"n": n, "kl": best_of_kl(n)} for n in ordered]
    for name, values in {"scores": scores, "gold": gold}.items():
        if values is not None:
            for point, mean in zip(curve, best_of_means(scores, values, ordered), strict=True):
                point[name] = float(mean)
    return curve


SCORE_NAMES = {"scores": "score", "gold": "gold score"}


def best_of_table(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curve as entries of the table for a terminal."""
    return [
        {
            "metric": f"best of {point['n']}, {text} (KL at most {point['kl']:.2f} nats)",
            "after": point[key],
        }
        for key, text in SCORE_NAMES.items()
        for point in curve
        if key in point
    ]
