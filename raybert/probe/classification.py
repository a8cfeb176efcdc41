"""Kind classification: how well a logistic regression reads a text's class off its frozen vector."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import numpy as np

from raybert.encode import POOLINGS
from raybert.probe.kind import Headline, Record, VectorKind, Vectors
from raybert.probe.statistics import paired_bootstrap
from raybert.probe.texts import LabelledTask, Texts, load_texts, test_texts


class ClassificationTask(LabelledTask):
    """A task of this kind, which is also the kind of a task that names none."""

    kind: Literal["classification"] = "classification"


class Classification(VectorKind):
    """scikit-learn is imported by those functions alone that fit something: whoever reads records needs none of it."""

    name = "classification"
    settings = ClassificationTask
    counted = "test texts"
    headline: ClassVar[Headline] = Headline(
        key="test_accuracy",
        title="test accuracy",
        short="test",
        share=True,
        others={"train_accuracy": "train", "macro_f1": "F1"},
        method="logistic regression on frozen vectors",
    )

    def read(self, task: ClassificationTask) -> Texts:
        return load_texts(task)

    def about(self, data: Texts) -> Record:
        from raybert.probe import tune

        return {
            "labels": data.names,
            "tuning": tune.describe(data.split(data.labels)[0], data.names),
            "dropped": data.dropped,
            "seen_in_train": data.seen_in_train,
            "n_train": data.n_train,
            "n_test": data.n_test,
        }

    def judge(self, data: Texts, vectors: Vectors) -> Record:
        """For each pooling what a classifier reaches with C = 1 and with C tuned and how far the vectors spread, and
        which test texts each got right."""
        from raybert.probe import classify, tune
        from raybert.probe.spread import spread

        train_y, test_y = data.split(data.labels)
        found: Record = {"correct": {}, "tuned_correct": {}}
        for pooling, of_pooling in vectors.items():
            train_x, test_x = data.split(of_pooling)
            score = classify.fit(train_x, train_y, test_x, test_y)
            tuned = tune.tune(train_x, train_y, test_x, test_y, score)
            found[pooling] = score.record() | tuned.record() | spread(of_pooling).record()
            found["correct"][pooling] = pack_bits(score.predictions == test_y)
            found["tuned_correct"][pooling] = pack_bits(tuned.predictions == test_y)
        return found

    def baselines(self, data: Texts) -> Mapping[str, Callable[[], Record]]:
        from raybert.probe import baselines

        return {"majority": lambda: baselines.majority(data), "tfidf": lambda: baselines.tfidf(data)}

    def difference(self, a: Record, b: Record, pooling: str) -> Record:
        """With C = 1 and, where both records have it, with C tuned."""
        found = _paired(a, b, pooling, "correct")
        if all(_is_tuned(record, pooling) for record in (a, b)):
            found["tuned"] = _paired(a, b, pooling, "tuned_correct")
        return found

    def compare(self, a: Record, b: Record, pooling: str) -> Record:
        found = super().compare(a, b, pooling)
        if "tuned" in found:
            for side, record in (("a", a), ("b", b)):
                found["tuned"] |= {side: record[pooling]["tuned_accuracy"], f"{side}_c": record[pooling]["tuned_c"]}
        return found

    def lacks(self, record: Record) -> str:
        digits, answers = _digits(record), record.get("correct", {})
        if not digits or any(len(answers.get(name, "")) != digits for name in POOLINGS):
            return "it has no predictions for individual texts"
        if not record.get("texts") or any(self.headline.of(record.get(name)) is None for name in POOLINGS):
            return "a part of the result is missing"
        return ""

    def summary(self, record: Mapping[str, Any]) -> str:
        return f"logistic regression on {record.get('n_train', '?')} texts, tested on {record.get('n_test', '?')}"

    def held_out(self, task: ClassificationTask) -> Iterable[str]:
        return test_texts(task)


def _is_tuned(record: Record, pooling: str) -> bool:
    """Whether the record has all that a comparison of its tuned figures needs."""
    answers = record.get("tuned_correct", {}).get(pooling, "")
    figures = (record[pooling].get(key) for key in ("tuned_accuracy", "tuned_c"))
    return len(answers) == _digits(record) and all(figure is not None for figure in figures)


def _digits(record: Record) -> int:
    """Hexadecimal digits of the answers to all test texts."""
    return 2 * -(-(record.get("n_test") or 0) // 8)


def _paired(a: Record, b: Record, pooling: str, key: str) -> Record:
    n = a["n_test"]
    return asdict(paired_bootstrap(unpack_bits(a[key][pooling], n), unpack_bits(b[key][pooling], n)))


def pack_bits(flags: np.ndarray) -> str:
    """(N,) booleans as hexadecimal digits."""
    return np.packbits(flags).tobytes().hex()


def unpack_bits(digits: str, n: int) -> np.ndarray:
    """The N booleans that `pack_bits` was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=n).astype(bool)
