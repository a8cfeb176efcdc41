"""The sampled texts of a probe task with their classes as integers."""

import hashlib
import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from raybert.encode import Text
from raybert.errors import InputError
from raybert.probe import tables
from raybert.probe.tasks import ProbeTask

TEST_SHARE = 0.25  # of the texts, where the task has no test file and says no numbers


@dataclass(frozen=True)
class Texts:
    """What a probe is made of. The first `n_train` texts are for training, the others for testing."""

    texts: list[Text]
    labels: np.ndarray  # (N,) int64, index into `names`
    names: list[str]
    n_train: int
    dropped: int  # rows without text or label that were passed over
    seen_in_train: int  # test texts that occur among the training texts as well
    hash: str  # of the texts, the labels and the split

    @property
    def n_test(self) -> int:
        return len(self.texts) - self.n_train

    def split(self, values: Any) -> tuple[Any, Any]:
        """(training part, test part) of N values in the order of the texts."""
        return values[: self.n_train], values[self.n_train :]


def load_texts(task: ProbeTask) -> Texts:
    """Read and sample the task's texts. The same files give the same texts, always.

    Raises:
        InputError: a file or a column is missing, a label is no class, there are too few texts, or a class of the test
            texts does not occur in the training texts.
    """
    if task.test is None:
        train, test, dropped = _hold_out(task)
    else:
        train, dropped_train = _sample(task, task.train, task.n_train)
        test, dropped_test = _sample(task, task.test, task.n_test)
        dropped = dropped_train + dropped_test
    if not train or not test:
        raise InputError(f"The probe task {task.name} has no {'test' if train else 'training'} texts.")
    names = _class_names(task, [label for _, label in train], [label for _, label in test])
    index = {label: position for position, label in enumerate(names)}
    texts = [text for text, _ in (*train, *test)]
    labels = np.array([index[label] for _, label in (*train, *test)], dtype=np.int64)
    known = {text for text, _ in train}
    digest = hashlib.sha256(repr((len(train), names)).encode())
    for text, label in zip(texts, labels, strict=True):
        digest.update(repr((text, int(label))).encode("utf-8", "surrogatepass"))
    return Texts(
        texts=texts,
        labels=labels,
        names=_shown(task, names),
        n_train=len(train),
        dropped=dropped,
        seen_in_train=sum(text in known for text, _ in test),
        hash=digest.hexdigest(),
    )


Sample = tuple[Text, str]


def _sample(task: ProbeTask, uri: str, size: int | None) -> tuple[list[Sample], int]:
    """`size` samples (all, when None) and how many rows were passed over."""
    dropped = 0

    def good() -> Any:
        nonlocal dropped
        for row in tables.rows(uri, [*task.columns, task.label]):
            sample = _to_sample(task, uri, row)
            if sample is None:
                dropped += 1
            else:
                yield sample

    if task.seed is None:
        return list(islice(good(), size)), dropped
    samples = list(good())
    order = np.random.default_rng(task.seed).permutation(len(samples))[:size]
    return [samples[i] for i in order], dropped


def _to_sample(task: ProbeTask, uri: str, row: tables.Row) -> Sample | None:
    """None where a text or the label is missing."""
    *parts, label = row
    if any(part is None or part == "" for part in parts) or label is None or label == "":
        return None
    for part in parts:
        if not isinstance(part, str):
            raise InputError(f"A text of {uri} (column {task.columns[0]}) is a {type(part).__name__}, not a string.")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, str) and re.fullmatch(r"-?\d+\.0*", label):
        label = int(label.partition(".")[0])  # csv of a column that was once one of floats
    if isinstance(label, int):  # True and False become 1 and 0
        label = int(label)
    elif not isinstance(label, str):
        raise InputError(
            f"The label {label!r} in {uri} is no class: column {task.label} must hold integers or strings."
        )
    return (parts[0] if len(parts) == 1 else (parts[0], parts[1])), str(label)


def _hold_out(task: ProbeTask) -> tuple[list[Sample], list[Sample], int]:
    """Split one set of texts at random; a text that occurs twice is taken once, so it cannot be on both sides."""
    samples, dropped = _sample(task.model_copy(update={"seed": task.seed or 0}), task.train, None)
    unique = list({text: (text, label) for text, label in reversed(samples)}.values())[::-1]
    n_test = task.n_test or max(1, round(TEST_SHARE * len(unique)))
    n_train = task.n_train or len(unique) - n_test
    if n_train < 1 or n_train + n_test > len(unique):
        raise InputError(
            f"The probe task {task.name} asks for {n_train} + {n_test} different texts and {task.train} has "
            f"{len(unique)}; lower n_train or n_test."
        )
    return unique[:n_train], unique[n_train : n_train + n_test], dropped


def _class_names(task: ProbeTask, train: list[str], test: list[str]) -> list[str]:
    """The classes of the training texts: integers in their order, else by name."""
    classes = set(train)
    unseen = sorted(set(test) - classes)
    if unseen:
        raise InputError(
            f"Classes of the test texts that no training text of the probe task {task.name} has: {', '.join(unseen)} "
            f"(training has {', '.join(_ordered(classes))})."
        )
    if len(classes) < 2:
        raise InputError(f"All training texts of the probe task {task.name} have the one class {train[0]}.")
    if len(classes) > len(train) // 2:
        raise InputError(
            f"The probe task {task.name} has {len(classes)} classes among {len(train)} training texts; "
            f"is {task.label} its label column?"
        )
    return _ordered(classes)


def _ordered(classes: set[str]) -> list[str]:
    try:
        return sorted(classes, key=int)
    except ValueError:
        return sorted(classes)


def _shown(task: ProbeTask, names: list[str]) -> list[str]:
    """The task's own names for labels 0, 1, ...; other labels name themselves."""
    given = dict(enumerate(task.label_names))
    return [given.get(int(name), name) if name.isdigit() else name for name in names]
