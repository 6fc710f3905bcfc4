"""Bootstrap intervals of means."""

import numpy as np

MAX_RESAMPLED = 2**22  # counts that the bootstrap draws at a time


def with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean of float[N] values by that name, and the ends of its 95 % bootstrap interval."""
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
