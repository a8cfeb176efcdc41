"""Ranked lists judged: nDCG, MRR and recall of the best documents of each query.

Of documents with equal scores the one with the larger number comes first, as in trec_eval the one with the larger id.

Shapes: Q queries, K kept documents of each.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Self

import numpy as np

from raybert.probe import statistics

KEPT = 100  # documents of each query, for recall@100
WEIGHED_AT_ONCE = 4_000_000  # pairs of a query and a document whose TF-IDF products are in memory at a time
WORD = re.compile(r"\b\w\w+\b")  # as bm25s and scikit-learn cut words


@dataclass(frozen=True)
class Relevance:
    """Which documents are relevant to which queries: pairs sorted by query, then document, each once."""

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


def highest(scores: np.ndarray, numbers: np.ndarray, kept: int) -> np.ndarray:
    """Places (up to `kept`) of the highest scores (N,), falling; among equal ones the larger number comes first."""
    places = np.arange(len(scores))
    if len(scores) > kept:
        places = np.flatnonzero(scores >= np.partition(scores, -kept)[-kept])
    return places[np.lexsort((-numbers[places], -scores[places]))[:kept]]


def bm25(queries: list[str], documents: list[str], kept: int = KEPT) -> np.ndarray | None:
    """Ranked documents (Q, K) by BM25 over the words of two letters or more, with the library's k1 = 1.5 and b = 0.75.

    -1 where no word is shared. None where the documents hold no such word.
    """
    import bm25s

    asked = [WORD.findall(query.lower()) for query in queries]
    # Words that no query asks for count in a document's length alone, so they are one word to the index, which then
    # grows with what is asked for.
    ids = {word: number for number, word in enumerate(dict.fromkeys(chain.from_iterable(asked)), start=1)}
    indexed = _Indexed({"": 0, **ids})
    for document in documents:
        indexed.add([ids.get(word, 0) for word in WORD.findall(document.lower())])
    if indexed.empty:
        return None
    index = bm25s.BM25(csc_backend="scipy")  # the other back end takes nearly twice the memory
    index.index(indexed, show_progress=False)
    del indexed
    found = np.full((len(queries), min(kept, len(documents))), -1, dtype=np.int64)
    for row, words in enumerate(asked):
        scores = index.get_scores_from_ids([ids[word] for word in words])
        shared = np.flatnonzero(scores)
        best = shared[highest(scores[shared], shared, kept)]
        found[row, : len(best)] = best
    return found


class _Indexed:
    """The documents' words as bm25s takes them, `ids` and `vocab`; a list of them is made when it is asked for."""

    def __init__(self, vocab: dict[str, int]) -> None:
        self.vocab = vocab
        self._words, self._ends = array("i"), array("q", [0])

    @property
    def ids(self) -> Self:
        return self

    @property
    def empty(self) -> bool:
        return not self._words

    def add(self, words: list[int]) -> None:
        self._words.extend(words)
        self._ends.append(len(self._words))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator["array[int]"]:
        return (self._words[first:last] for first, last in pairwise(self._ends))


def tfidf(queries: list[str], documents: list[str], kept: int = KEPT) -> np.ndarray | None:
    """As `bm25`, by the cosine of TF-IDF weights (scikit-learn's defaults)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words, counts = TfidfVectorizer().build_analyzer(), Counter[str]()
    for document in documents:
        counts.update(set(words(document)))
    if not counts:
        return None
    # Fitted by these counts instead of `fit_transform`, which would hold the weights of all documents.
    vocabulary = sorted(counts)
    vectorizer = TfidfVectorizer(vocabulary=vocabulary, dtype=np.float32)
    frequency = np.array([counts[word] for word in vocabulary])
    vectorizer.idf_ = np.log((1 + len(documents)) / (1 + frequency)) + 1
    columns = vectorizer.transform(queries).T.tocsr()  # (words, Q)
    kept = min(kept, len(documents))
    found = np.full((len(queries), kept), -1, dtype=np.int64)
    best = np.zeros((len(queries), kept), dtype=np.float32)
    at_once = max(1, WEIGHED_AT_ONCE // len(queries))
    for first in range(0, len(documents), at_once):
        weights = vectorizer.transform(documents[first : first + at_once])
        products = (weights @ columns).T.tocsr()  # (Q, documents of the block)
        for row in range(len(queries)):
            span = slice(*products.indptr[row : row + 2])
            before = int((best[row] > 0).sum())
            scores = np.concatenate([best[row, :before], products.data[span]])
            numbers = np.concatenate([found[row, :before], products.indices[span] + first])
            top = highest(scores, numbers, kept)
            best[row, : len(top)], found[row, : len(top)] = scores[top], numbers[top]
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
        return {"absent": "the documents contain no word of two letters or more"}
    return entry(figures(ranked, relevance), headline)
