"""Best-of-n sampling: the mean score of the best of n responses by the score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.functional import pass_at_k
from rlhf_jax.runtime.evaluation.diagnostics import with_interval
from rlhf_jax.runtime.evaluation.policies import EvaluatedResponses


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


def further_keys(key: jax.Array, count: int) -> list[jax.Array]:
    """Keys of the second to the last of `count` responses to each prompt; `key` is the first's.

    Numbers from the top of the range: the first ones are those of the batches of a response.
    """
    return [jax.random.fold_in(key, 2**31 - number) for number in range(1, count)]


def pass_metrics(scores: np.ndarray, threshold: float) -> dict[str, float]:
    """`pass@k` with `pass@k_low` and `pass@k_high`, for k = 1, 2, 4, ... and the largest, K.

    The probability that at least one of k responses reaches the threshold, by the unbiased estimate
    of `functional.pass_at_k` for each prompt; the 95 % interval is over the prompts.

    Args:
      scores: float[N, K], of K responses to each prompt.
      threshold: the score of a success, or more.

    Chen et al., Evaluating Large Language Models Trained on Code, eq. 1 (arXiv:2107.03374).

    >>> metrics = pass_metrics(np.array([[1.0, 0.0], [0.0, 0.0]]), threshold=1.0)
    >>> metrics["pass@1"], metrics["pass@2"]
    (0.25, 0.5)
    """
    count = scores.shape[1]
    successes = jnp.asarray((np.asarray(scores) >= threshold).sum(axis=1), jnp.int32)
    sizes = [*itertools.takewhile(lambda k: k < count, (2**n for n in range(32))), count]
    metrics: dict[str, float] = {}
    for k in sizes:
        values = np.asarray(pass_at_k(successes, count, k))
        metrics |= with_interval(f"pass@{k}", values)
    return metrics


def with_passes(
    evaluation: Mapping[str, Any],
    groups: Mapping[str, Sequence[EvaluatedResponses]],
    threshold: float,
) -> dict[str, Any]:
    """The content of `evaluation.json` with pass@k, and with all responses in its samples.

    Args:
      groups: K responses to each prompt, "after" and perhaps "before".

    Raises:
      InputError: the responses have no scores.
    """
    scored = {
        side: [each.scores for each in group if each.scores is not None]
        for side, group in groups.items()
    }
    if not scored["after"]:
        raise InputError(
            "evaluation.num_responses is for pass@k, which needs a score: give "
            "--model.reward_path a reward model, or --rewards a list of sources."
        )
    metrics = {
        side: pass_metrics(np.stack(scores, axis=1), threshold) for side, scores in scored.items()
    }
    table = [
        {
            "metric": name,
            **{side: values[name] for side, values in metrics.items()},
            "interval": [metrics["after"][f"{name}_low"], metrics["after"][f"{name}_high"]],
        }
        for name in metrics["after"]
        if f"{name}_low" in metrics["after"]
    ]
    before = {f"before_{name}": value for name, value in metrics.get("before", {}).items()}
    further = groups["after"][1:]
    samples = [
        {
            **sample,
            "further": [
                {"response": each.responses[number], "score": float(each.scores[number])}
                for each in further
                if each.scores is not None
            ],
        }
        for number, sample in enumerate(evaluation["samples"])
    ]
    return {
        **evaluation,
        "metrics": {**evaluation["metrics"], **metrics["after"], **before},
        "table": [*evaluation["table"], *table],
        "samples": samples,
    }
