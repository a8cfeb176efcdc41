"""Kind similarity: do the cosines of pairs of texts rise with the scores that people gave them?

Spearman's correlation of the two, as STS is judged (Reimers et al. 2016, https://aclanthology.org/C16-1009).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from raybert.errors import InputError
from raybert.probe import statistics, tables
from raybert.probe.kind import (
    FEWEST,
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
from raybert.probe.texts import choose, full_text

CONSTANT = "All pairs have the same cosine, so Spearman's correlation is not defined and counts as 0."


class SimilarityTask(ProbeTask):
    """Pairs of texts, each with a score of how alike they are. The first rows are taken, or random ones with a seed."""

    URIS: ClassVar[tuple[str, ...]] = ("test",)

    kind: Literal["similarity"] = "similarity"
    test: str = Field(
        description="parquet, csv or jsonl: a file, directory or glob, at any URI or relative to the YAML file"
    )
    text: tuple[str, str] = Field(default=("text1", "text2"), description="the two text columns")
    label: str = Field(default="label", description="column of the scores")
    n_test: int | None = Field(default=None, ge=FEWEST, description="pairs to use; all when not set")
    seed: int | None = Field(
        default=None, ge=0, description="draw rows at random with this seed; by default the first rows are used"
    )

    @property
    def files(self) -> list[tuple[str, list[str]]]:
        return [(self.test, [*self.text, self.label])]


@dataclass(frozen=True)
class Pairs:
    """`texts` holds the first texts of all pairs, then the second ones."""

    texts: list[str]
    scores: np.ndarray  # (N,) float64
    hash: str


class Similarity(VectorKind):
    name = "similarity"
    settings = SimilarityTask
    counted = "pairs"
    headline: ClassVar[Headline] = Headline(
        key="spearman",
        title="Spearman",
        short="Spearman",
        share=False,
        others={"pearson": "Pearson"},
        method="cosine of frozen vectors",
    )

    def check(self, task: ProbeTask) -> None:
        check_files(task)
        self.read(task)  # type: ignore[arg-type]

    def read(self, task: SimilarityTask) -> Pairs:
        """
        Raises:
            InputError: a text is empty, a score is not a number, all scores are the same, or there are too few pairs.
        """
        chosen = choose(tables.rows(task.test, [*task.text, task.label]), task.n_test, task.seed)
        if len(chosen) < FEWEST:
            raise InputError(
                f"The probe task {task.name} has {len(chosen)} pairs in {task.test}; a correlation needs at "
                f"least {FEWEST}."
            )
        first, second = ([full_text(row.values[i], row, task.text[i]) for row in chosen] for i in (0, 1))
        scores = np.array([number(row.values[2], row, task.label) for row in chosen])
        if np.ptp(scores) == 0:
            raise InputError(
                f"All {len(scores)} pairs of the probe task {task.name} have the score {scores[0]:g}, so the "
                f"correlation is not defined; is {task.label} its column of scores?"
            )
        return Pairs([*first, *second], scores, digest(self.name, first, second, scores.tolist()))

    def about(self, data: Pairs) -> Record:
        return {"n_test": len(data.scores)}

    def judge(self, data: Pairs, vectors: Vectors) -> Record:
        """For each pooling Spearman's and Pearson's correlation of cosines and scores; evidence: the cosines of each
        pooling, and the scores."""
        from raybert.probe.spread import spread

        found: Record = {"evidence": {"scores": pack_floats(data.scores)}}
        for pooling, of_pooling in vectors.items():
            cosines = rowwise_cosines(*np.split(of_pooling, 2))
            found[pooling] = _figures(cosines, data.scores) | spread(of_pooling).record()
            found["evidence"][pooling] = pack_floats(cosines)
            if np.ptp(cosines) == 0:
                found[pooling]["warnings"] = [CONSTANT]
        return found

    def baselines(self, data: Pairs) -> Mapping[str, Callable[[], Record]]:
        return {"tfidf": lambda: _tfidf(data)}

    def difference(self, a: Record, b: Record, pooling: str) -> Record:
        scores = unpack_floats(a["evidence"]["scores"])
        x, y = (unpack_floats(record["evidence"][pooling]) for record in (a, b))

        def differences(rows: np.ndarray) -> np.ndarray:
            of_x, of_y = (statistics.spearman_of_samples(one, scores, rows) for one in (x, y))
            return of_y - of_x

        before, now = (float(statistics.spearman(one[None], scores[None])[0]) for one in (x, y))
        return statistics.difference(before, now, statistics.bootstrap(differences, len(scores)))

    def lacks(self, record: Record) -> str:
        return lacks_evidence(record, [*(name for name in record.get("evidence", {})), "scores"])

    def summary(self, record: Mapping[str, Any]) -> str:
        return f"Spearman's correlation of the cosines of {record.get('n_test', '?')} pairs with their scores"

    def held_out(self, task: SimilarityTask) -> Iterable[str]:
        return self.read(task.model_copy(update={"n_test": None})).texts


def rowwise_cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosines of the rows of x and y (N, D): (N,) float32; 0 for a vector of zeros."""
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.einsum("nd,nd->n", x, y) / np.where(lengths > 0, lengths, 1.0)


def _figures(cosines: np.ndarray, scores: np.ndarray) -> Record:
    cosines = cosines.astype(np.float64)
    draws = statistics.bootstrap(lambda rows: statistics.spearman_of_samples(cosines, scores, rows), len(scores))
    return {
        "spearman": float(statistics.spearman(cosines[None], scores[None])[0]),
        "pearson": float(statistics.pearson(cosines[None], scores[None])[0]),
        "interval": statistics.interval(draws),
    }


def _tfidf(data: Pairs) -> Record:
    from raybert.probe.baselines import word_weights

    weights = word_weights(data.texts)
    if weights is None:
        return {"absent": "the texts contain no word of two letters or more"}
    half = len(data.scores)
    cosines = np.asarray(weights[:half].multiply(weights[half:]).sum(axis=1)).ravel()  # the rows have length 1
    if np.ptp(cosines) == 0:
        return {"absent": "all pairs have the same cosine of TF-IDF weights"}
    return _figures(cosines, data.scores)


def number(value: Any, row: tables.Row, column: str) -> float:
    """A score, which is a number or a text that is one.

    Raises:
        InputError: it is none.
    """
    try:
        found = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{row.place}: the score {value!r} in column {column} is not a number.")
    return found
