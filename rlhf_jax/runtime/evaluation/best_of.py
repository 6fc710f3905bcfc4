"""Best-of-n: how good the best of n responses is, chosen by the score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.runtime.evaluation.pairs import points_of
from rlhf_jax.runtime.report.charts import Chart, Series, line_chart


def best_of_means(proxy: np.ndarray, scores: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Mean score of the best of n responses, by the proxy score, for several n at once.

    The mean over all subsets of n of the K responses to a prompt, and over prompts: an unbiased
    estimate from K responses of what n fresh ones would give. With c(v) of the K proxy scores at
    most v, the best of a subset is at most v in C(c(v), n) of C(K, n) subsets, so that a response
    of proxy score v, of which there are m, is chosen with probability

        w(v) = (C(c(v), n) - C(c(v) - m, n)) / (m C(K, n))

    which shares ties equally.

    Args:
      proxy: float[N, K], which of the responses is best.
      scores: float[N, K], how good each of them is: the proxy score itself, or a gold score.
      sizes: each n from 1 to K.

    Returns:
      float64[len(sizes)].

    Nakano et al., WebGPT, appendix I (arXiv:2112.09332), there without ties.

    >>> proxy, gold = np.array([[0.1, 0.7, 0.4]]), np.array([[1.0, 2.0, 6.0]])
    >>> best_of_means(proxy, gold, [1, 2, 3]).round(4).tolist()
    [3.0, 3.3333, 2.0]
    """
    proxy, scores = np.asarray(proxy, np.float64), np.asarray(scores, np.float64)
    ordered = np.sort(proxy, axis=1)
    rows = list(zip(ordered, proxy, strict=True))
    up_to = np.stack([np.searchsorted(row, values, side="right") for row, values in rows])
    below = np.stack([np.searchsorted(row, values, side="left") for row, values in rows])
    means = []
    for size in sizes:
        share = _shares_of_subsets(proxy.shape[1], size)
        weights = (share[up_to] - share[below]) / (up_to - below)
        means.append(float(np.mean(np.sum(weights * scores, axis=1))))
    return np.asarray(means)


def _shares_of_subsets(count: int, size: int) -> np.ndarray:
    """float64[count + 1]: the share of subsets of this size that lie within the first c."""
    total = math.comb(count, size)
    return np.array([math.comb(c, size) / total for c in range(count + 1)])


def best_of_kl(n: int) -> float:
    """KL of best-of-n to the policy that it chooses from, in nats per response: at most this.

        log n - (n - 1) / n

    Stiennon et al., Learning to Summarize from Human Feedback, appendix G.3 (arXiv:2009.01325).
    All but exact where each single response is improbable, and a bound otherwise (Beirami et al.,
    Theoretical Guarantees on the Best-of-n Alignment Policy, arXiv:2401.01879).

    >>> print(best_of_kl(1), round(best_of_kl(16), 3))
    0.0 1.835
    """
    return math.log(n) - (n - 1) / n


def best_of_curve(
    scores: np.ndarray, gold: np.ndarray | None, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows {"n", "kl", "scores"} and, where there is a gold score, "gold", in the order of n.

    Args:
      scores: float[N, K], which also choose.
      gold: float[N, K], or None.
      sizes: each n from 1 to K.
    """
    ordered = sorted(set(sizes))
    columns = {"scores": best_of_means(scores, scores, ordered)}
    if gold is not None:
        columns["gold"] = best_of_means(scores, gold, ordered)
    return [
        {"n": n, "kl": best_of_kl(n), **{name: float(x[row]) for name, x in columns.items()}}
        for row, n in enumerate(ordered)
    ]


_NAMES = {"scores": "score", "gold": "gold score"}


def best_of_table(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curve as rows of the table for a terminal."""
    return [
        {
            "metric": f"best of {row['n']}, {text} (KL at most {row['kl']:.2f} nats)",
            "after": row[key],
        }
        for key, text in _NAMES.items()
        for row in curve
        if key in row
    ]


def best_of_charts(evaluation: Mapping[str, Any]) -> tuple[Chart, ...]:
    """The curve of the report, if the content of an `evaluation.json` has one.

    Where the gold score falls and the score goes on rising, the latter is overoptimized.
    """
    rows = evaluation.get("best_of")
    lines = [Series(text, points_of(rows, "kl", key)) for key, text in _NAMES.items()]
    sizes = [n for n, _ in points_of(rows, "n", "kl")]
    note = f"n = {', '.join(f'{n:.0f}' for n in sizes)}"
    chart = line_chart("Best of n", lines, note=note, x_label="KL to the policy at most, nats")
    return () if chart is None else (chart,)
