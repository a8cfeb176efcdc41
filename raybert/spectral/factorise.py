"""Counts to vectors: positive pointwise mutual information and its truncated singular value decomposition.

The result is bit-equal for any number of threads: each multiplies blocks of rows of a fixed size, with one thread in
the library beneath, and sums over blocks are taken in their order.

Shapes: R rows, C columns, k components.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from raybert.spectral.count import Counts

SMOOTHING = 0.75  # power of the columns' counts: https://aclanthology.org/Q15-1016 (Levy, Goldberg and Dagan 2015)
OVERSAMPLING = 10
BLOCK_ROWS = 2048
# A direction whose share of the largest one's variance is below this is rounding.
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


def principal_vectors(matrix: np.ndarray, rank: int, *, seed: int, threads: int = 1) -> np.ndarray:
    """float32 (R, k), k <= `rank`: U S of the truncated decomposition U S V^T, the largest component first.

    Random projection with one power iteration (Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061, algorithms
    4.4 and 5.1). In each component the entry of largest size is positive. k is less than `rank` when the matrix has not
    so many directions.
    """
    from threadpoolctl import threadpool_limits  # here, so that `ppmi` does without

    rows, columns = matrix.shape
    sketch = min(rank + OVERSAMPLING, rows, columns)
    drawn = np.random.default_rng(seed).standard_normal((columns, sketch), np.float32)
    blocks = [slice(low, low + BLOCK_ROWS) for low in range(0, rows, BLOCK_ROWS)]
    basis = np.empty((rows, sketch), np.float32)

    def there_and_back(block: slice) -> np.ndarray:  # A^T (A Omega)
        return matrix[block].T @ (matrix[block] @ drawn)

    def project(block: slice) -> np.ndarray:
        basis[block] = matrix[block] @ directions
        return _gram(basis[block].T)

    def back(block: slice) -> np.ndarray:
        basis[block] = basis[block] @ whiten
        return basis[block].T @ matrix[block]

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        directions = np.linalg.qr(_total(pool, there_and_back, blocks).astype(np.float64))[0].astype(np.float32)
        # An orthonormal basis of A's range by the eigenvectors of (A Z)^T (A Z), which is k x k.
        variance, vectors = _largest_first(_total(pool, project, blocks))
        kept = variance > NEGLIGIBLE * variance[0]
        whiten = np.where(kept, vectors / np.sqrt(np.where(kept, variance, 1)), 0).astype(np.float32)
        variance, vectors = _largest_first(_gram(_total(pool, back, blocks)))
        size = min(rank, int((variance > NEGLIGIBLE * variance[0]).sum()))
        turn = (vectors * np.sqrt(np.maximum(variance, 0)))[:, :size].astype(np.float32)
        found = np.concatenate(list(pool.map(lambda block: basis[block] @ turn, blocks)))
    largest = found[np.abs(found).argmax(axis=0), np.arange(size)]
    return np.asarray(found * np.where(largest < 0, -1, 1).astype(np.float32))


def _gram(values: np.ndarray) -> np.ndarray:
    """(k, n) -> (k, k) in float64"""
    wide = values.astype(np.float64)
    return wide @ wide.T


def _largest_first(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(symmetric)
    return values[::-1], vectors[:, ::-1]


def _total(pool: ThreadPoolExecutor, function: Callable[[slice], np.ndarray], blocks: Sequence[slice]) -> np.ndarray:
    """The sum over blocks, in their order whichever is done first."""
    results = pool.map(function, blocks)
    total = next(results)
    for part in results:
        total += part
    return total
