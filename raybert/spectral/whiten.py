"""Token vectors by which two halves of one text differ as much in one direction as in another. No Ray here.

By the first components of a table any two pieces of text differ, pieces of one text included. What tells texts apart
lies in all of them, and a classifier with a fixed penalty hardly reads the small ones. So each direction is divided by
its deviation within texts: within-class covariance normalisation (Hatch, Kajarekar and Stolcke 2006,
https://www.isca-archive.org/interspeech_2006/hatch06_interspeech.html), with texts as the classes.

Shapes: W windows, V tokens, D numbers of a vector.
"""

from collections.abc import Iterable

import numpy as np
import torch

from raybert.data.units import UnitRows


def whiten(vectors: np.ndarray, units: Iterable[UnitRows]) -> np.ndarray:
    """float32 (V, D): `vectors` without their mean over the text, each direction divided by its deviation within texts.

    Rows of zeros, of tokens without a vector, stay zeros. The number of threads changes only the rounding of float64.
    """
    read = [_halves(unit) for unit in units]
    counts = np.sum([np.bincount(tokens, minlength=len(vectors)) for tokens, _ in read], axis=0)
    unseen = ~vectors.any(axis=1)
    mean = ((counts / counts.sum()) @ vectors).astype(np.float32)
    about_mean = np.ascontiguousarray(vectors - mean)  # a table from a file lies in columns, and rows are read
    about_mean[unseen] = 0
    table = torch.from_numpy(about_mean)
    windows, size = sum(len(bounds) // 2 for _, bounds in read), vectors.shape[1]
    within = np.sum([_scatter(tokens, bounds, table) for tokens, bounds in read], axis=0)
    # Shrinkage: D more differences, one along each axis, of the mean square. Few windows leave small variances unknown.
    within = (within + np.trace(within) / windows * np.eye(size)) / (windows + size)
    variance, directions = np.linalg.eigh(within)
    # Back in the old directions, so that no choice of eigenvectors shows.
    return about_mean @ ((directions / np.sqrt(variance)) @ directions.T).astype(np.float32)


def _halves(unit: UnitRows) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all windows that have two, and where their halves begin, in turns, and the last one ends."""
    lengths = np.diff(unit.token_offsets)
    kept = lengths >= 2
    first = lengths[kept] // 2
    bounds = np.append(0, np.cumsum(np.stack([first, lengths[kept] - first], axis=1)))
    return unit.tokens[np.repeat(kept, lengths)], bounds


def _scatter(tokens: np.ndarray, bounds: np.ndarray, vectors: torch.Tensor) -> np.ndarray:
    """(D, D) in float64: sum over windows of d d^T, d the mean vector of the one half less that of the other."""
    ids, starts = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(bounds[:-1])
    means = torch.nn.functional.embedding_bag(ids, vectors, starts, mode="mean")  # (2W, D)
    differences = (means[0::2] - means[1::2]).numpy().astype(np.float64)
    return np.asarray(differences.T @ differences)
