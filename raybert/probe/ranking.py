"""Ranked lists judged: nDCG, MRR and recall of the best documents of each query.

Shapes: Q queries, K kept documents of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from raybert.probe import statistics

KEPT = 100  # documents of each query, for recall@100
AT_ONCE = 8_000_000  # similarities in memory at a time


@dataclass(frozen=True)
class Relevance:
    """Which documents are right for which queries: pairs sorted by query, then document, each once."""

    query: np.ndarray  # (R,) int64
    document: np.ndarray  # (R,) int64
    grade: np.ndarray  # (R,) float64, above 0
    queries: int
    documents: int

    def grades(self, ranked: np.ndarray) -> np.ndarray:
        """Grades of ranked documents (Q, K), 0 for wrong ones and for -1, which stands for none."""
        known = self.query * self.documents + self.document
        wanted = np.arange(self.queries)[:, None] * self.documents + ranked
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where((known[place] == wanted) & (ranked >= 0), self.grade[place], 0.0)


def figures(ranked: np.ndarray, relevance: Relevance) -> dict[str, np.ndarray]:
    """Figures of each query, float64 (Q,): ndcg_at_10, mrr_at_10, and recall_at_1, recall_at_10 and recall_at_100, the
    share of the right ones that is found.

    Of nDCG the gains are the grades and the discounts log2 of the rank plus 1 (Järvelin and Kekäläinen 2002,
    https://doi.org/10.1145/582415.582418).

    Args:
        ranked: document numbers (Q, K), the best first; -1 for none.
    """
    grades = relevance.grades(ranked)  # (Q, K)
    right = np.bincount(relevance.query, minlength=relevance.queries)
    discounts = 1 / np.log2(np.arange(2, 12))  # (10,)
    # The best order that there is: each query's grades, falling; their places in it are counted from its first.
    order = np.lexsort((-relevance.grade, relevance.query))
    place = np.arange(len(order)) - np.concatenate([[0], np.cumsum(right)])[relevance.query[order]]
    first = place < 10
    gains = relevance.grade[order][first] * discounts[place[first]]
    ideal = np.bincount(relevance.query[order][first], gains, minlength=relevance.queries)
    top = grades[:, :10]
    hits = top > 0
    return {
        "ndcg_at_10": (top * discounts[: top.shape[1]]).sum(axis=1) / ideal,
        "mrr_at_10": np.where(hits.any(axis=1), 1 / (1 + hits.argmax(axis=1)), 0.0),
        **{f"recall_at_{k}": (grades[:, :k] > 0).sum(axis=1) / right for k in (1, 10, 100)},
    }


def entry(of_queries: dict[str, np.ndarray], headline: str) -> dict[str, Any]:
    """Means over the queries, and the interval of the headline, for a record."""
    means = {name: float(values.mean()) for name, values in of_queries.items()}
    return means | {"interval": statistics.mean_interval(of_queries[headline])}


def bm25(queries: list[str], documents: list[str], kept: int = KEPT) -> np.ndarray | None:
    """Ranked documents (Q, K) by BM25 over the words of two letters or more, with the library's k1 = 1.5 and b = 0.75.

    -1 where no word is shared. None where the documents hold no such word.
    """
    import bm25s

    options: dict[str, Any] = {"stopwords": [], "show_progress": False}
    index = bm25s.BM25()
    words = bm25s.tokenize(documents, **options)
    if not words.vocab or not any(words.ids):
        return None
    index.index(words, show_progress=False)
    asked = bm25s.tokenize(queries, return_ids=False, **options)
    known = [[word for word in each if word in words.vocab] for each in asked]
    found = np.full((len(queries), min(kept, len(documents))), -1, dtype=np.int64)
    rows = [row for row, each in enumerate(known) if each]
    if rows:
        result = index.retrieve([known[row] for row in rows], k=found.shape[1], show_progress=False)
        found[rows] = np.where(result.scores > 0, result.documents, -1)
    return found


def tfidf(queries: list[str], documents: list[str], kept: int = KEPT) -> np.ndarray | None:
    """As `bm25`, by the cosine of TF-IDF weights (scikit-learn's defaults)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(dtype=np.float32)
    if not any(map(vectorizer.build_analyzer(), documents)):
        return None
    columns = vectorizer.fit_transform(documents).T.tocsr()
    rows = vectorizer.transform(queries)
    found = np.full((len(queries), min(kept, len(documents))), -1, dtype=np.int64)
    at_once = max(1, AT_ONCE // len(documents))
    for first in range(0, len(queries), at_once):
        products = rows[first : first + at_once] @ columns
        for row in range(products.shape[0]):
            span = slice(*products.indptr[row : row + 2])
            scores, numbers = products.data[span], products.indices[span]
            order = np.lexsort((numbers, -scores))[: found.shape[1]]
            found[first + row, : len(order)] = numbers[order]
    return found


def baseline(
    rank: Callable[[list[str], list[str]], np.ndarray | None],
    queries: list[str],
    documents: list[str],
    relevance: Relevance,
    headline: str,
) -> dict[str, Any]:
    """The entry of `bm25` or `tfidf`, or why there is none."""
    ranked = rank(queries, documents)
    if ranked is None:
        return {"absent": "the documents hold no word of two letters or more"}
    return entry(figures(ranked, relevance), headline)
