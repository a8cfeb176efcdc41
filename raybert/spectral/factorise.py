"""Counts to vectors: positive pointwise mutual information and its truncated singular value decomposition.

The result is bit-equal for any number of threads: each multiplies blocks of a fixed size, with one thread in the
library beneath, no two threads write to the same place, and one thread finds the eigenvectors.

Shapes: R rows, C columns, k components.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from raybert.spectral.count import Counts

SMOOTHING = 0.75  # power of the columns' counts: https://aclanthology.org/Q15-1016 (Levy, Goldberg and Dagan 2015)
BLOCK_ROWS, BLOCK_COLUMNS = 2048, 500
SMALL = 1000  # columns up to which products and eigenvectors are in float64
# A direction whose share of the largest one's variance is below this is rounding of the matrix, which is float32; of
# products in float32 there is more.
NEGLIGIBLE = 1e-9


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
    k is less than `rank` when the matrix has fewer directions.
    """
    # Here, so that `ppmi` does without them.
    from scipy.linalg import eigh
    from threadpoolctl import threadpool_limits

    rows, columns = matrix.shape
    small = columns <= SMALL
    products = np.zeros((columns, columns), np.float64 if small else np.float32)

    def multiply(first: int) -> None:  # on and above the diagonal
        own = slice(first, min(first + BLOCK_COLUMNS, columns))
        left, right = matrix[:, : own.stop], matrix[:, own]
        products[: own.stop, own] = left.T.astype(products.dtype, copy=False) @ right

    def project(block: slice) -> None:
        np.matmul(matrix[block], turn, out=found[block])

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(multiply, reversed(range(0, columns, BLOCK_COLUMNS))))  # the largest first
        largest = (columns - min(rank, rows, columns), columns - 1)
        variance, vectors = eigh(products, lower=False, subset_by_index=largest, check_finite=False)
        rounding = NEGLIGIBLE if small else columns**0.5 * np.finfo(np.float32).eps
        kept = variance > rounding * variance[-1]
        turn = np.ascontiguousarray(vectors[:, kept][:, ::-1], np.float32)  # the largest first
        del vectors
        found = np.empty((rows, turn.shape[1]), np.float32)
        list(pool.map(project, [slice(low, low + BLOCK_ROWS) for low in range(0, rows, BLOCK_ROWS)]))
    found *= np.where(found.max(axis=0) < -found.min(axis=0), -1, 1).astype(np.float32)
    return found
