"""Kind retrieval: is the right document among those whose vectors lie nearest to the query's?

Exact: every document is compared with every query, block by block, and the best of each query are kept.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from raybert.errors import InputError
from raybert.probe import ranking, statistics, tables
from raybert.probe.kind import (
    FEWEST,
    Collector,
    Headline,
    ProbeTask,
    Record,
    VectorKind,
    Vectors,
    check_files,
    digest,
    lacks_evidence,
    pack_floats,
    unpack_floats,
)
from raybert.probe.ranking import Relevance
from raybert.probe.similarity import number
from raybert.probe.texts import full_text

if TYPE_CHECKING:
    from raybert.probe.nearest import Best


class RetrievalTask(ProbeTask):
    """Queries, documents and their relevance: a file of pairs, or three files that refer to each other by ids."""

    URIS: ClassVar[tuple[str, ...]] = ("pairs", "queries", "documents", "relevance")

    kind: Literal["retrieval"] = "retrieval"
    pairs: str | None = Field(
        default=None, description="file with a query and its relevant document in each row, in the columns of `text`"
    )
    text: tuple[str, str] = Field(default=("query", "document"), description="the two columns of `pairs`")
    label: str | None = Field(default=None, description="column of `pairs` with a score; needs `least`")
    least: float | None = Field(default=None, description="leave out rows of `pairs` with a lower score")
    queries: str | None = Field(default=None, description="file of queries: an id and a text in each row")
    documents: str | None = Field(default=None, description="file of documents: an id and a text in each row")
    relevance: str | None = Field(default=None, description="file of judgements, in the columns of `judged`")
    row: tuple[str, str] = Field(default=("id", "text"), description="columns of `queries` and `documents`")
    judged: tuple[str, str, str] = Field(
        default=("query_id", "document_id", "score"), description="columns of `relevance`; a score above 0 is relevant"
    )
    n_queries: int = Field(
        default=2000, ge=FEWEST, description="number of queries to draw; all are used if there are fewer"
    )
    seed: int = Field(default=0, ge=0, description="seed of that draw")

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        given = [key for key in ("queries", "documents", "relevance") if getattr(self, key) is not None]
        if (self.pairs is not None) == bool(given) or len(given) not in (0, 3):
            raise ValueError("give either pairs, or all of queries, documents and relevance")
        if (self.label is None) != (self.least is None):
            raise ValueError("give both label (the column of scores) and least (the lowest score to keep), or neither")
        return self

    @property
    def files(self) -> list[tuple[str, list[str]]]:
        if self.pairs is not None:
            return [(self.pairs, [*self.text, *([self.label] if self.label else [])])]
        columns = {"queries": self.row, "documents": self.row, "relevance": self.judged}
        return [(str(getattr(self, key)), list(wanted)) for key, wanted in columns.items()]


@dataclass(frozen=True)
class Ranked:
    """`texts` holds the queries, then the documents."""

    texts: list[str]
    relevance: Relevance
    hash: str
    dropped: int = 0  # of what was read, what could not be used

    @property
    def leading(self) -> int:
        """The queries are encoded first, so that no document has to be kept."""
        return self.relevance.queries

    @property
    def queries(self) -> list[str]:
        return self.texts[: self.leading]

    @property
    def documents(self) -> list[str]:
        return self.texts[self.leading :]


class Retrieval(VectorKind):
    name = "retrieval"
    settings: ClassVar[type[ProbeTask]] = RetrievalTask
    counted = "queries"
    headline: ClassVar[Headline] = Headline(
        key="ndcg_at_10",
        title="nDCG@10",
        short="nDCG@10",
        share=False,
        others={
            "mrr_at_10": "MRR@10",
            "recall_at_1": "recall@1",
            "recall_at_10": "recall@10",
            "recall_at_100": "recall@100",
        },
        method="nearest frozen vectors by cosine",
    )

    def check(self, task: ProbeTask) -> None:
        check_files(task)
        self.read(task)

    def read(self, task: Any) -> Ranked:
        """
        Raises:
            InputError: a text is empty, a query has no relevant document, an id is unknown or occurs twice, or there
                are too few queries.
        """
        return _of_pairs(self.name, task) if task.pairs is not None else _of_files(self.name, task)

    def about(self, data: Ranked) -> Record:
        return {"n_test": data.relevance.queries, "n_documents": data.relevance.documents}

    def collector(self, data: Ranked) -> Collector:
        return _Collector(self, data)

    def judge(self, data: Ranked, vectors: Vectors) -> Record:
        collector = self.collector(data)
        collector.add(np.arange(len(data.texts)), vectors)
        return collector.finish()

    def baselines(self, data: Ranked) -> Mapping[str, Callable[[], Record]]:
        parts = data.queries, data.documents, data.relevance, self.headline.key
        return {
            "bm25": lambda: ranking.baseline(ranking.bm25, *parts),
            "tfidf": lambda: ranking.baseline(ranking.tfidf, *parts),
        }

    def difference(self, a: Record, b: Record, pooling: str) -> Record:
        return statistics.mean_difference(*(unpack_floats(record["evidence"][pooling]) for record in (a, b)))

    def lacks(self, record: Record) -> str:
        return lacks_evidence(record, list(record.get("evidence", {})))

    def summary(self, record: Mapping[str, Any]) -> str:
        documents = record.get("n_documents", "?")
        return f"{record.get('n_test', '?')} queries, each used to find its relevant document among {documents}"

    def held_out(self, task: Any) -> Iterable[str]:
        """Every query, so that another draw of them may be judged later, and every document that is relevant to one."""
        data = self.read(task.model_copy(update={"n_queries": sys.maxsize}))
        yield from data.queries
        documents = data.documents
        yield from (documents[number] for number in np.unique(data.relevance.document))


class _Collector(Collector):
    """Keeps the queries' vectors, and of the documents the best of each query.

    Documents that come before the last query wait for it: those that are queries of another task in the same pass.
    """

    def __init__(self, kind: VectorKind, data: Ranked) -> None:
        self._kind, self._data = kind, data
        self._queries: dict[str, np.ndarray] = {}
        self._best: dict[str, Best] = {}
        self._waiting: list[tuple[np.ndarray, Vectors]] = []
        self._seen = 0

    def add(self, rows: np.ndarray, vectors: Vectors) -> None:
        leading = self._data.leading
        first = rows < leading
        for pooling, found in vectors.items():
            kept = self._queries.setdefault(pooling, np.empty((leading, found.shape[1]), dtype=np.float32))
            kept[rows[first]] = found[first]
        self._seen += int(first.sum())
        if not first.all():
            # Without a copy where documents alone have come.
            documents = {name: found[~first] for name, found in vectors.items()} if first.any() else vectors
            self._waiting.append((rows[~first] - leading, documents))
        if self._seen == leading:
            for numbers, documents in self._waiting:
                self._look_at(numbers, documents)
            self._waiting.clear()

    def _look_at(self, numbers: np.ndarray, documents: Vectors) -> None:
        from raybert.probe.nearest import Best  # with torch, which who only reads the headline does without

        for pooling, vectors in documents.items():
            if pooling not in self._best:
                self._best[pooling] = Best(self._queries[pooling])
            self._best[pooling].add(numbers, vectors)

    def finish(self) -> Record:
        """For each pooling the means over the queries and how far their vectors spread; evidence: the headline of each
        query."""
        from raybert.probe.spread import spread

        found: Record = {"evidence": {}}
        for pooling, best in self._best.items():
            of_queries = ranking.figures(best.ranked(), self._data.relevance)
            found[pooling] = ranking.entry(of_queries, self._kind.headline.key)
            found[pooling] |= spread(self._queries[pooling]).record()
            found["evidence"][pooling] = pack_floats(of_queries[self._kind.headline.key])
        return found


def from_right_pairs(kind: str, task: ProbeTask, pairs: list[tuple[str, str]], n_queries: int, seed: int) -> Ranked:
    """Queries and documents by their texts: a text that occurs twice is one, with all its right partners.

    Raises:
        InputError: there are too few queries.
    """
    documents = {text: number for number, text in enumerate(dict.fromkeys(document for _, document in pairs))}
    queries = {text: number for number, text in enumerate(dict.fromkeys(query for query, _ in pairs))}
    right = ((queries[query], documents[document], 1.0) for query, document in pairs)
    return _ranked(kind, task, list(queries), list(documents), right, n_queries, seed)


def _of_pairs(kind: str, task: RetrievalTask) -> Ranked:
    uri, columns = task.files[0]
    pairs = []
    for row in tables.rows(uri, columns):
        if task.label is not None and number(row.values[2], row, task.label) < (task.least or 0.0):
            continue
        query, document = (full_text(row.values[i], row, task.text[i]) for i in (0, 1))
        pairs.append((query, document))
    return from_right_pairs(kind, task, pairs, task.n_queries, task.seed)


def _of_files(kind: str, task: RetrievalTask) -> Ranked:
    of_queries, of_documents, of_relevance = task.files
    queries, documents = _by_id(task, of_queries), _by_id(task, of_documents)
    # By their ids: so the larger number is the larger id, which settles ties as in trec_eval.
    places = {name: place for place, name in enumerate(sorted(documents))}
    texts = [documents[name] for name in places]
    query_places = {name: place for place, name in enumerate(queries)}
    same = _same_texts(texts)
    right, answered = [], set()
    for row in tables.rows(*of_relevance):
        query, document = (str(value) for value in row.values[:2])
        grade = number(row.values[2], row, task.judged[2])
        for side, known, name in (("queries", queries, query), ("documents", documents, document)):
            if name not in known:
                raise InputError(f"{row.place}: the {side} of the probe task {task.name} have no id {name}.")
        if grade > 0:
            answered.add(query)
            place = places[document]
            right += [(query_places[query], each, grade) for each in same.get(texts[place], [place])]
    for name in queries:
        if name not in answered:
            raise InputError(
                f"The query {name} of the probe task {task.name} has no relevant document in {task.relevance}; "
                "add one, or leave the query out."
            )
    return _ranked(kind, task, list(queries.values()), texts, right, task.n_queries, task.seed)


def _by_id(task: RetrievalTask, source: tuple[str, list[str]]) -> dict[str, str]:
    """The texts of a file of queries or documents by their ids.

    Raises:
        InputError: an id occurs twice, or a text is empty.
    """
    found: dict[str, str] = {}
    for row in tables.rows(*source):
        name = str(row.values[0])
        if name in found:
            raise InputError(f"{row.place}: the id {name} occurs twice.")
        found[name] = full_text(row.values[1], row, task.row[1])
    return found


def _same_texts(texts: list[str]) -> dict[str, list[int]]:
    """The texts that occur more than once, and where: nothing tells such documents apart, so that what is right for one
    is right for all."""
    first: dict[str, int] = {}
    same: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        if (before := first.setdefault(text, place)) != place:
            same.setdefault(text, [before]).append(place)
    return same


def _ranked(
    kind: str,
    task: ProbeTask,
    queries: list[str],
    documents: list[str],
    right: Iterable[tuple[int, int, float]],
    n_queries: int,
    seed: int,
) -> Ranked:
    """
    Args:
        right: query, document and grade; of a pair that stands there twice the higher grade counts.
    """
    if len(queries) < FEWEST:
        raise InputError(
            f"The probe task {task.name} has {len(queries)} queries with a relevant document; it needs at "
            f"least {FEWEST}."
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(queries))[:n_queries])
    place = np.full(len(queries), -1)
    place[chosen] = np.arange(len(chosen))
    grades: dict[tuple[int, int], float] = {}
    for of_all, document, grade in right:
        if place[of_all] >= 0:
            key = int(place[of_all]), document
            grades[key] = max(grade, grades.get(key, 0.0))
    pairs = sorted((query, document, grade) for (query, document), grade in grades.items())
    of_query, of_document, of_grade = (np.array(column) for column in zip(*pairs, strict=True))
    relevance = Relevance(of_query, of_document, of_grade, len(chosen), len(documents))
    texts = [*(queries[i] for i in chosen), *documents]
    return Ranked(texts, relevance, digest(kind, len(chosen), texts, pairs))
