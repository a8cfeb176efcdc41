"""Counts to vectors: positive pointwise mutual information and its truncated singular value decomposition.

The result is bit-equal for any number of threads: each multiplies blocks of a fixed size, with one thread in the
library beneath, and no two write to one place.

Shapes: R rows, C columns, k components.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from raybert.spectral.count import Counts

SMOOTHING = 0.75  # power of the columns' counts: https://aclanthology.org/Q15-1016 (Levy, Goldberg and Dagan 2015)
BLOCK_ROWS, BLOCK_COLUMNS = 2048, 500
# A direction whose share of the largest one's variance is below this is float32's rounding.
NEGLIGIBLE = 1e-6


def ppmi(parts: Sequence[Counts], columns: int) -> np.ndarray:
    """float32 (R, C): max(0, log p(row, column) / (p(row) p(column))), with p(column) from smoothed counts."""
    by_row = np.concatenate([_row_sums(part) for part in parts])
    by_column = np.sum([np.bincount(part.columns, part.values, columns) for part in parts], axis=0)
    # n(r, c) N / (n(r) N m(c) / M) with m(c) = n(c)^0.75 and M their sum.
    with np.errstate(divide="ignore"):  # of rows and columns without a pair, which no entry refers to
        row_log, smooth = np.log(by_row), by_column**SMOOTHING
        column_log = np.log(smooth) - np.log(smooth.sum())
    matrix = np.zeros((len(by_row), columns), np.float32)
    first = 0
    for part in parts:
        for low in range(0, len(part), BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, len(part))
            own = slice(part.starts[low], part.starts[high])
            rows = np.repeat(np.arange(first + low, first + high), np.diff(part.starts[low : high + 1]))
            wide = part.columns[own]
            information = np.log(part.values[own].astype(np.float64)) - row_log[rows] - column_log[wide]
            matrix[rows, wide] = np.maximum(information, 0)
        first += len(part)
    return matrix


def _row_sums(part: Counts) -> np.ndarray:
    sums = np.append(0, np.cumsum(part.values, dtype=np.int64))
    return np.diff(sums[part.starts])


def principal_vectors(matrix: np.ndarray, rank: int, *, threads: int = 1) -> np.ndarray:
    """float32 (R, k), k <= `rank`: U S of the truncated decomposition U S V^T, the largest component first.

    V are eigenvectors of A^T A, which is C x C, and U S = A V. In each component the entry of largest size is positive.
    k is less than `rank` when the matrix has not so many directions.
    """
    # Here, so that `ppmi` does without them.
    from scipy.linalg import eigh
    from threadpoolctl import threadpool_limits

    rows, columns = matrix.shape
    products = np.zeros((columns, columns), np.float32)

    def multiply(first: int) -> None:  # on and above the diagonal
        last = min(first + BLOCK_COLUMNS, columns)
        products[:last, first:last] = matrix[:, :last].T @ matrix[:, first:last]

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(multiply, reversed(range(0, columns, BLOCK_COLUMNS))))  # the largest first
        sought = min(rank, rows, columns)
        variance, vectors = eigh(
            products, lower=False, subset_by_index=(columns - sought, columns - 1), overwrite_a=True, check_finite=False
        )
        kept = variance > NEGLIGIBLE * variance[-1]
        turn = vectors[:, kept][:, ::-1]  # the largest first
        blocks = [slice(low, low + BLOCK_ROWS) for low in range(0, rows, BLOCK_ROWS)]
        found = np.concatenate(list(pool.map(lambda block: matrix[block] @ turn, blocks)))
    largest = found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])]
    return np.asarray(found * np.where(largest < 0, -1, 1).astype(np.float32))
