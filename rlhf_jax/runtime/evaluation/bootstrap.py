"""How sure a mean is: the bootstrap."""

import numpy as np

MAX_RESAMPLED = 2**22


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of a mean.

    The values, one for each prompt, are drawn anew with replacement, as many as there are; the
    interval reaches from the (1 - level) / 2 to the (1 + level) / 2 quantile of the means. It says
    what other prompts would have given, not what other responses to the same ones would have. With
    few prompts it is too narrow, and where all values are equal it has no width.

    Args:
      values: float[N], N at least 1.
      level: how often the interval is to hold the true mean.
      num_resamples: means that the quantiles are taken of.
      seed: of the draws.

    Returns:
      (low, high).

    Efron, Bootstrap Methods: Another Look at the Jackknife (1979).

    >>> bootstrap_interval(np.array([1.0, 0.0, 1.0, 1.0]), num_resamples=1000)
    (0.25, 1.0)
    """
    # Wins are few different numbers: drawing how often each comes up is far less than each draw.
    different, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    rng, total = np.random.default_rng(seed), int(counts.sum())
    block = max(1, MAX_RESAMPLED // len(different))
    sizes = [min(block, num_resamples - start) for start in range(0, num_resamples, block)]
    drawn = (rng.multinomial(total, counts / total, size=size) for size in sizes)
    averages = np.concatenate([times @ different for times in drawn]) / total
    low, high = np.quantile(averages, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
