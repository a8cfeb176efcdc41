"""How sure a measured figure is: intervals, and comparisons of two encoders on the same texts."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
ROUNDS = 10_000  # of the bootstrap of accuracies, which needs no figures of single texts
BOOTSTRAPS = 1_000  # of one that does
DRAWN_AT_ONCE = 2_000_000  # row numbers, so that its memory does not grow with what is measured


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927, https://doi.org/10.2307/2276774); within 0..1.

    Raises:
        ValueError: there are no trials, or not 0 <= successes <= trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is not a fraction")
    share = successes / trials
    z = Z95
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


@dataclass(frozen=True)
class Comparison:
    """Accuracy of B minus that of A on the same texts."""

    difference: float
    interval: tuple[float, float]  # 95 %
    p_value: float  # two-sided, of no difference
    only_a: int  # texts that A alone got right
    only_b: int
    n: int


def paired_bootstrap(correct_a: np.ndarray, correct_b: np.ndarray) -> Comparison:
    """Compare two classifiers by resampling the texts (percentile bootstrap, Efron and Tibshirani 1993).

    A text counts -1 (A alone right), 0 or +1 (B alone right). Drawing N texts with replacement is drawing the numbers
    of these three from a multinomial distribution, which is what is done: exact, and N times cheaper.

    Args:
        correct_a, correct_b: (N,) booleans for the same texts in the same order.

    Raises:
        ValueError: the arrays are empty or differ in length.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"need two arrays of equal length, not {a.shape} and {b.shape}")
    n = len(a)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    shares = [only_a / n, only_b / n, (n - only_a - only_b) / n]
    draws = np.random.default_rng(0).multinomial(n, shares, size=ROUNDS)
    differences = (draws[:, 1] - draws[:, 0]) / n
    low, high = interval(differences)
    return Comparison(
        difference=(only_b - only_a) / n,
        interval=(low, high),
        p_value=p_value(differences),
        only_a=only_a,
        only_b=only_b,
        n=n,
    )


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n: int) -> np.ndarray:
    """The statistic of samples drawn with replacement from n things, (BOOTSTRAPS,); always the same draws for one n.

    Args:
        statistic: row numbers (K, n) of K samples -> (K,).
    """
    rng = np.random.default_rng(0)
    at_once = max(1, min(BOOTSTRAPS, DRAWN_AT_ONCE // n))
    parts = [min(at_once, BOOTSTRAPS - first) for first in range(0, BOOTSTRAPS, at_once)]
    return np.concatenate([statistic(rng.integers(n, size=(part, n))) for part in parts])


def interval(draws: np.ndarray) -> list[float]:
    """The 95 % percentile interval of `bootstrap`'s draws."""
    return [float(bound) for bound in np.quantile(draws, [0.025, 0.975])]


def difference(a: float, b: float, draws: np.ndarray) -> dict[str, Any]:
    """b - a beside the draws of that difference: difference, interval (95 %) and p_value (two-sided, of none)."""
    return {"difference": b - a, "interval": interval(draws), "p_value": p_value(draws)}


def p_value(draws: np.ndarray) -> float:
    """Two-sided, of no difference: the share of the draws of one that lie on the other side of zero, twice. One is
    added so that it is never exactly 0."""
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(draws) + 1)))


def mean_interval(values: np.ndarray) -> list[float]:
    """Of the mean of values (N,), by resampling them."""
    return interval(bootstrap(lambda rows: values[rows].mean(axis=1), len(values)))


def mean_difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """`difference` of the means of values for the same N things."""
    draws = bootstrap(lambda rows: (b - a)[rows].mean(axis=1), len(a))
    return difference(float(a.mean()), float(b.mean()), draws)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of the rows of x and y (K, N), with the mean rank for ties: (K,); 0 where one of a
    pair of rows is constant, for which it is not defined."""
    from scipy.stats import rankdata  # seconds to import, and who reads records has no use for it

    return pearson(rankdata(x, axis=1), rankdata(y, axis=1))


def spearman_of_samples(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`spearman` of samples of x and y (N,) with the row numbers (K, n): (K,)."""
    return pearson(_ranks_in_samples(x, rows), _ranks_in_samples(y, rows))


def _ranks_in_samples(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean ranks (K, n) within each sample of the values (N,). They are sorted once instead of K times."""
    levels, level = np.unique(values, return_inverse=True)
    drawn, samples = level[rows], len(rows)
    places = drawn + len(levels) * np.arange(samples)[:, None]
    counts = np.bincount(places.ravel(), minlength=samples * len(levels)).reshape(samples, -1)
    ranks = counts.cumsum(axis=1) - (counts - 1) / 2
    return np.take_along_axis(ranks, drawn, axis=1)


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the rows of x and y (K, N): (K,); 0 where one of a pair of rows is constant."""
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.where(scale > 0, (x * y).sum(axis=1) / np.where(scale > 0, scale, 1.0), 0.0)
