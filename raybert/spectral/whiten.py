"""Token vectors by which two halves of one text differ as much in one direction as in another. No Ray here.

By the first components of a table any two pieces of text differ, pieces of one text included. What tells texts apart
lies in all of them, and a classifier with a fixed penalty hardly reads the small ones. So each direction is divided by
its deviation within texts: within-class covariance normalisation (Hatch, Kajarekar and Stolcke 2006,
https://www.isca-archive.org/interspeech_2006/hatch06_interspeech.html), with texts as the classes.

Shapes: W windows, V tokens, D numbers of a vector.
"""

from collections.abc import Iterable

import numpy as np

from raybert.data.units import UnitRows

# Directions that vary less than this share of the mean are not made larger any more.
FLOOR = 1e-6


def whiten(vectors: np.ndarray, units: Iterable[UnitRows]) -> np.ndarray:
    """float32 (V, D): `vectors` without their mean over the text, each direction divided by its deviation within texts.

    Rows of zeros, of tokens without a vector, stay zeros. The number of threads changes only the rounding of float64.
    """
    from sklearn.covariance import ledoit_wolf  # here: it takes a second, and only a new run needs it

    parts = [(_halves(unit), np.bincount(unit.tokens, minlength=len(vectors))) for unit in units]
    counts = np.sum([count for _, count in parts], axis=0)
    seen = vectors.any(axis=1, keepdims=True)  # (V, 1)
    about_mean = np.where(seen, vectors - (counts / counts.sum()) @ vectors, 0)  # (V, D)
    differences = np.concatenate([_differences(halves, about_mean) for halves, _ in parts])  # (W, D)
    # Shrunk towards a multiple of the identity, the more the fewer windows there are.
    covariance, _ = ledoit_wolf(differences, assume_centered=True)
    variance, directions = np.linalg.eigh(covariance)
    scale = 1 / np.sqrt(np.maximum(variance, FLOOR * variance.mean()))
    # Back in the old directions, so that no choice of eigenvectors shows.
    return np.asarray(about_mean @ ((directions * scale) @ directions.T), np.float32)


def _halves(unit: UnitRows) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all windows that have two, and where their halves begin and end: (2W + 1,), in turns."""
    lengths = np.diff(unit.token_offsets)
    kept = lengths >= 2
    tokens = unit.tokens[np.repeat(kept, lengths)]
    first = lengths[kept] // 2
    return tokens, np.append(0, np.cumsum(np.stack([first, lengths[kept] - first], axis=1)))


def _differences(halves: tuple[np.ndarray, np.ndarray], vectors: np.ndarray) -> np.ndarray:
    """(W, D): mean vector of the first half of each window less that of the second."""
    from scipy.sparse import csr_array

    tokens, bounds = halves
    shape = (len(bounds) - 1, len(vectors))
    sums = csr_array((np.ones(len(tokens)), tokens.astype(np.int64), bounds), shape=shape) @ vectors
    means = sums / np.diff(bounds)[:, None]
    return np.asarray(means[0::2] - means[1::2])
