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
MOST_ROWS = 65_536  # of the matrix that are in memory at a time: 1.3 GB with 5,000 columns
SMALL = 1000  # columns up to which products and eigenvectors are in float64
# A direction whose share of the largest one's variance is below this is rounding of the matrix, which is float32; of
# products in float32 there is more.
NEGLIGIBLE = 1e-9


class Information:
    """Positive pointwise mutual information, (R, C): max(0, log p(row, column) / (p(row) p(column))), with p(column)
    from smoothed counts. A slice of rows is float32 and made when it is taken: the whole would be 5 GB of 250,000 rows.
    """

    def __init__(self, parts: Sequence[Counts], columns: int) -> None:
        self._parts = parts
        by_row = np.concatenate([_row_sums(part) for part in parts])
        by_column = np.sum([np.bincount(part.columns, part.values, columns) for part in parts], axis=0)
        self.shape = len(by_row), columns
        # n(r, c) N / (n(r) N m(c) / M) with m(c) = n(c)^0.75 and M their sum.
        with np.errstate(divide="ignore"):  # of rows and columns without a pair, which no entry refers to
            self._row_log, smooth = np.log(by_row), by_column**SMOOTHING
            self._column_log = np.log(smooth) - np.log(smooth.sum())

    def __getitem__(self, wanted: slice) -> np.ndarray:
        first, stop, _ = wanted.indices(self.shape[0])
        matrix = np.zeros((stop - first, self.shape[1]), np.float32)
        begin = 0  # of the part
        for part in self._parts:
            end = min(stop - begin, len(part))
            for low in range(max(first - begin, 0), end, BLOCK_ROWS):
                high = min(low + BLOCK_ROWS, end)
                own = slice(part.starts[low], part.starts[high])
                rows = np.repeat(np.arange(begin + low, begin + high), np.diff(part.starts[low : high + 1]))
                wide = part.columns[own]
                information = np.log(part.values[own].astype(np.float64)) - self._row_log[rows] - self._column_log[wide]
                matrix[rows - first, wide] = np.maximum(information, 0)
            begin += len(part)
        return matrix


def _row_sums(part: Counts) -> np.ndarray:
    sums = np.append(0, np.cumsum(part.values, dtype=np.int64))
    return np.diff(sums[part.starts])


def principal_vectors(matrix: np.ndarray | Information, rank: int, *, threads: int = 1) -> np.ndarray:
    """float32 (R, k), k <= `rank`: U S of the truncated decomposition U S V^T, the largest component first.

    V are eigenvectors of A^T A, which is C x C, and U S = A V. In each component the entry of largest size is positive.
    k is less than `rank` when the matrix has fewer directions. No more than `MOST_ROWS` rows are in memory at a time.
    """
    # Here, so that counting does without them.
    from scipy.linalg import eigh
    from threadpoolctl import threadpool_limits

    rows, columns = matrix.shape
    blocks = [slice(low, min(low + MOST_ROWS, rows)) for low in range(0, rows, MOST_ROWS)]
    block = matrix[blocks[0]]
    small = columns <= SMALL
    products = np.zeros((columns, columns), np.float64 if small else np.float32)

    def multiply(first: int) -> None:  # on and above the diagonal
        own = slice(first, min(first + BLOCK_COLUMNS, columns))
        left, right = block[:, : own.stop], block[:, own]
        products[: own.stop, own] += left.T.astype(products.dtype, copy=False) @ right

    def project(low: int) -> None:
        part = block[low : low + BLOCK_ROWS]
        np.matmul(part, turn, out=found[place.start + low : place.start + low + len(part)])

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        for number, place in enumerate(blocks):
            if number:
                del block
                block = matrix[place]
            list(pool.map(multiply, reversed(range(0, columns, BLOCK_COLUMNS))))  # the largest first
        largest = (columns - min(rank, rows, columns), columns - 1)
        variance, vectors = eigh(products, lower=False, subset_by_index=largest, check_finite=False)
        rounding = NEGLIGIBLE if small else columns**0.5 * np.finfo(np.float32).eps
        kept = variance > rounding * variance[-1]
        turn = np.ascontiguousarray(vectors[:, kept][:, ::-1], np.float32)  # the largest first
        del vectors
        found = np.empty((rows, turn.shape[1]), np.float32)
        for number, place in enumerate(reversed(blocks)):  # the last one is still there
            if number:
                del block
                block = matrix[place]
            list(pool.map(project, range(0, len(block), BLOCK_ROWS)))
    found *= np.where(found.max(axis=0) < -found.min(axis=0), -1, 1).astype(np.float32)
    return found
