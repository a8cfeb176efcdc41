"""The documents nearest to each query, block by block: exact, in memory that does not grow with the documents.

Shapes: Q queries, K kept documents of each, B documents of a block, D hidden size.
"""

import numpy as np
import torch
from torch import Tensor

from raybert.probe.ranking import KEPT

AT_ONCE = 1_000_000  # cosines in memory at a time, some 50 bytes each
NUMBER_BITS = 31  # of a document's number in a key


class Best:
    """The K documents of highest cosine for each query so far; of equal ones those with the larger numbers.

    The same whatever the order and the blocks in which documents come: cosines are computed in float64 and compared in
    float32, where how a matrix product adds up does not show.
    """

    def __init__(self, queries: np.ndarray, kept: int = KEPT) -> None:
        self._queries, self._kept = _unit(queries), kept  # (Q, D)
        self._keys = torch.empty((len(queries), 0), dtype=torch.int64)  # (Q, K), falling

    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Look at documents with these numbers (B,) and vectors (B, D)."""
        documents, unit, found = torch.from_numpy(numbers.astype(np.int64)), _unit(vectors), []
        rows = max(1, AT_ONCE // max(1, len(numbers)))
        for first in range(0, len(self._queries), rows):
            part = slice(first, first + rows)
            new = _keys(self._queries[part] @ unit.T, documents)  # (rows, B)
            keys = torch.cat([self._keys[part], new], dim=1)
            found.append(keys.topk(min(self._kept, keys.shape[1]), dim=1).values)
        self._keys = torch.cat(found)

    def ranked(self) -> np.ndarray:
        """Document numbers (Q, K), the best first."""
        return (self._keys & (2**NUMBER_BITS - 1)).numpy()


def _keys(cosines: Tensor, documents: Tensor) -> Tensor:
    """Integers (Q, B) in the order of the cosines and, where these are equal, of the documents' numbers (B,)."""
    bits = (cosines.float() + 0.0).view(torch.int32).to(torch.int64)  # adding 0 turns -0 into 0
    # The bits of positive floats rise with them; those of negative ones fall, but for the sign.
    rising = torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits)
    return (rising << NUMBER_BITS) + documents


def _unit(vectors: np.ndarray) -> Tensor:
    found = torch.from_numpy(vectors.astype(np.float64))
    found /= found.norm(dim=1, keepdim=True).clamp(min=1e-12)  # in place: it is as large as a block twice over
    return found
