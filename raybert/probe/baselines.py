"""What a probe's accuracy is compared with: no features, word counts, and the same encoder before any training.

They depend on the texts (and, for the last, on the architecture) alone, so they are computed once and kept under a hash
of both.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import typer
from sklearn.feature_extraction.text import TfidfVectorizer

from raybert import storage
from raybert.probe import classify, tune
from raybert.probe.texts import Texts
from raybert.records import read_object

Record = dict[str, Any]
# Part of every cache key: raise it when the figures would come out differently for the same texts.
VERSION = 3


class Cache:
    """Computed records as JSON objects in a directory at any URI."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def get(
        self, key: str, compute: Callable[[], Record], *, keep: Callable[[Record], bool] = lambda record: True
    ) -> Record:
        """The record under `key`, computed if it is not there, or damaged, and then written, if it is one to keep."""
        name = hashlib.sha256(f"{VERSION}:{key}".encode()).hexdigest()
        uri = storage.join(self._uri, f"{name}.json")
        with suppress(FileNotFoundError, ValueError):
            return read_object(uri)
        record = compute()
        if keep(record):
            storage.write_json(uri, record)
        return record


def local_cache() -> Cache:
    """In the user's own directory, for probes outside of runs."""
    return Cache(str(Path(typer.get_app_dir("raybert")) / "baselines"))


def majority(texts: Texts) -> Record:
    """Always answer the most frequent class of the training texts."""
    train, test = texts.split(texts.labels)
    winner = np.bincount(train).argmax()
    return classify.score(np.full(len(train), winner), train, np.full(len(test), winner), test).record()


def word_weights(texts: list[str]) -> Any:
    """TF-IDF weights of the words (scikit-learn's defaults) as a sparse matrix (N, words).

    Each row has length 1 or, of a text without a word, 0. None where no text holds a word of two letters or more.
    """
    vectorizer = TfidfVectorizer()
    if not any(map(vectorizer.build_analyzer(), texts)):
        return None
    return vectorizer.fit_transform(texts)


def tfidf(texts: Texts) -> Record:
    """TF-IDF weights of the words (scikit-learn's defaults) and the probe's own classifier, with C = 1 and tuned.

    Texts without a single word (symbols, letters that stand alone) have no such baseline: "absent" says so.
    """
    plain = [text if isinstance(text, str) else " ".join(text) for text in texts.texts]
    train, test = texts.split(plain)
    vectorizer = TfidfVectorizer()
    if not any(map(vectorizer.build_analyzer(), train)):
        return {"absent": "the training texts contain no word of two letters or more"}
    features = vectorizer.fit_transform(train)
    train_y, test_y = texts.split(texts.labels)
    sides = features, train_y, vectorizer.transform(test), test_y
    score = classify.fit(*sides)
    return score.record() | tune.tune(*sides, score).record()
