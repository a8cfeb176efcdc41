"""How sure a measured accuracy is: intervals, and comparisons of two classifiers on the same texts."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
ROUNDS = 10_000  # of the bootstrap


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927, https://doi.org/10.2307/2276774); within 0..1.

    Raises:
        ValueError: there are no trials, or not 0 <= successes <= trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"no share: {successes} of {trials}")
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
        raise ValueError(f"need two equally long arrays, not {a.shape} and {b.shape}")
    n = len(a)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    shares = [only_a / n, only_b / n, (n - only_a - only_b) / n]
    draws = np.random.default_rng(0).multinomial(n, shares, size=ROUNDS)
    differences = (draws[:, 1] - draws[:, 0]) / n
    low, high = np.quantile(differences, [0.025, 0.975])
    # The share of resamples on the other side of zero, twice; one is added so that it is never exactly 0.
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return Comparison(
        difference=(only_b - only_a) / n,
        interval=(float(low), float(high)),
        p_value=float(min(1.0, 2 * (tail + 1) / (ROUNDS + 1))),
        only_a=only_a,
        only_b=only_b,
        n=n,
    )
