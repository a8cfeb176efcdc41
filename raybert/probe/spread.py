"""How far the vectors of different texts lie apart, and in how many directions."""

from dataclasses import dataclass
from typing import Any

import numpy as np

# Below these, vectors have collapsed. The deviation is a share of their length: 1 % is a mean cosine of 0.9999 between
# texts, and about what bfloat16 rounds away. A rank of 1.5 is nine tenths of the variance in one direction.
LEAST_DEVIATION = 0.01
LEAST_RANK = 1.5


@dataclass(frozen=True)
class Spread:
    """Of N vectors: their standard deviation over texts and their effective rank."""

    deviation: float  # of an element, root mean square over the D elements
    effective_rank: float  # 1 to D; 0 where all vectors are the same
    collapsed: str  # a sentence; empty where they have not

    def record(self) -> dict[str, Any]:
        """Ready for JSON; "collapsed" is there only where it says something."""
        found: dict[str, Any] = {"deviation": self.deviation, "effective_rank": self.effective_rank}
        return found | ({"collapsed": self.collapsed} if self.collapsed else {})


def spread(vectors: np.ndarray) -> Spread:
    """Measure vectors (N, D).

    The effective rank is exp(H) of the entropy H of the shares that the principal directions have of the variance: that
    of Roy and Vetterli (2007, https://ieeexplore.ieee.org/document/7098875) for the D x D covariance matrix.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    covariance = np.atleast_2d(np.cov(vectors, rowvar=False, bias=True))  # (D, D), float64
    variances = np.linalg.eigvalsh(covariance).clip(min=0.0)
    total = float(variances.sum())
    shares = variances[variances > 0] / total
    rank = float(np.exp(-(shares * np.log(shares)).sum())) if total else 0.0
    length = float(np.sqrt((mean**2).sum() + total))  # root mean square
    apart = np.sqrt(total) / length if length else 0.0
    return Spread(float(np.sqrt(total / vectors.shape[1])), rank, _collapse(apart, rank))


def _collapse(apart: float, rank: float) -> str:
    if apart < LEAST_DEVIATION:
        return (
            f"The vectors have collapsed: across texts they vary by only {100 * apart:.1g} % of their length, and "
            "hardly tell one text from another."
        )
    if rank < LEAST_RANK:
        return (
            f"The vectors have collapsed: all texts lie along one line (effective rank {rank:.1f}), so they "
            "describe a text by a single number."
        )
    return ""
