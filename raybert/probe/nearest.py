"""The documents nearest to each query, block by block: exact, in memory that does not grow with the documents.

Shapes: Q queries, K kept documents of each, B documents of a block, D hidden size.
"""

import numpy as np
import torch

from raybert.probe.ranking import AT_ONCE, KEPT


class Best:
    """The K documents of highest cosine for each query so far, whatever the order in which documents come."""

    def __init__(self, queries: np.ndarray, kept: int = KEPT) -> None:
        self._queries, self._kept = _unit(queries), kept  # (Q, D)
        self._scores = torch.full((len(queries), 0), 0.0)
        self._documents = torch.empty((len(queries), 0), dtype=torch.int64)

    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Look at documents with these numbers (B,) and vectors (B, D)."""
        documents, found, scores = torch.from_numpy(numbers.astype(np.int64)), [], []
        unit = _unit(vectors)
        rows = max(1, AT_ONCE // max(1, len(numbers)))
        for first in range(0, len(self._queries), rows):
            part = slice(first, first + rows)
            cosines = torch.cat([self._scores[part], self._queries[part] @ unit.T], dim=1)  # (rows, K + B)
            top, places = cosines.topk(min(self._kept, cosines.shape[1]), dim=1)
            before = self._documents.shape[1]
            kept = self._documents[part]
            new = documents[(places - before).clamp(min=0)]
            old = kept.gather(1, places.clamp(max=max(0, before - 1))) if before else new
            found.append(torch.where(places < before, old, new))
            scores.append(top)
        self._documents, self._scores = torch.cat(found), torch.cat(scores)

    def ranked(self) -> np.ndarray:
        """Document numbers (Q, K), the best first."""
        return self._documents.numpy()


def _unit(vectors: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(vectors)), dim=1)
