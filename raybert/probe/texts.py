"""Texts with a label each: what such a task says of its files, and the sampled texts with their classes as integers."""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, TypeVar

import numpy as np
from pydantic import Field

from raybert.data.text.values import MISSING, refusal, text_of
from raybert.encode import Text
from raybert.errors import InputError
from raybert.probe import tables
from raybert.probe.kind import ProbeTask

# ASCII digits: str.isdigit is also true of digits that int() refuses, such as those in a circle.
INTEGER = re.compile(r"-?[0-9]{1,100}")
FLOAT = re.compile(r"-?[0-9]{1,100}\.0*")
TRUTH = {"true": "1", "false": "0", "1": "1", "0": "0"}
TEST_SHARE = 0.25  # of the texts, where the task has no test file and says no numbers


class LabelledTask(ProbeTask):
    """Texts with labels, and how they are sampled. The first rows are taken, or random ones when a seed is given."""

    URIS: ClassVar[tuple[str, ...]] = ("train", "test")

    train: str = Field(
        description="parquet, csv or jsonl: a file, directory or glob, at any URI or relative to the YAML file"
    )
    test: str | None = Field(default=None, description="the same; without it, texts of `train` are held out")
    text: str | tuple[str, str] = Field(default="text", description="text column, or the two columns of a pair")
    label: str = Field(default="label", description="column of the labels")
    label_names: list[str] = Field(default_factory=list, description="names of integer labels 0, 1, ...")
    n_train: int | None = Field(default=None, gt=1, description="training rows to use; all when not set")
    n_test: int | None = Field(default=None, gt=0, description="test rows to use; all when not set")
    seed: int | None = Field(
        default=None, ge=0, description="draw rows at random with this seed; by default the first rows are used"
    )

    @property
    def columns(self) -> list[str]:
        """The text column, or the two of a pair."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def files(self) -> list[tuple[str, list[str]]]:
        return [(uri, [*self.columns, self.label]) for uri in (self.train, self.test) if uri is not None]


@dataclass(frozen=True)
class Texts:
    """What a probe is made of. The first `n_train` texts are for training, the others for testing."""

    texts: list[Text]
    labels: np.ndarray  # (N,) int64, index into `names`
    names: list[str]
    n_train: int
    dropped: int  # rows without text or label that were skipped
    seen_in_train: int  # test texts that occur among the training texts as well
    hash: str  # of the texts, the labels and the split

    @property
    def n_test(self) -> int:
        return len(self.texts) - self.n_train

    def split(self, values: Any) -> tuple[Any, Any]:
        """(training part, test part) of N values in the order of the texts."""
        return values[: self.n_train], values[self.n_train :]


def load_texts(task: LabelledTask) -> Texts:
    """Read and sample the task's texts. The same files give the same texts, always.

    Raises:
        InputError: a file or a column is missing, a label is not a class, there are too few texts, or a class of the
            test texts does not occur in the training texts.
    """
    if task.test is None:
        train, test, dropped = _hold_out(task)
    else:
        train, dropped_train = _sample(task, task.train, task.n_train)
        test, dropped_test = _sample(task, task.test, task.n_test)
        dropped = dropped_train + dropped_test
    train, test = _with_one_spelling(train, test)
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


def test_texts(task: LabelledTask) -> Iterator[str]:
    """Every text of the test file, so that `n_test` may be raised later; without one, the texts that are held out.

    Raises:
        InputError: as `load_texts`.
    """
    texts = load_texts(task if task.test is None else task.model_copy(update={"n_test": None}))
    for text in texts.split(texts.texts)[1]:
        yield from [text] if isinstance(text, str) else text


T = TypeVar("T")
Sample = tuple[Text, str]


def _sample(task: LabelledTask, uri: str, size: int | None) -> tuple[list[Sample], int]:
    """`size` samples (all, when None) and how many rows were skipped."""
    dropped = 0

    def good() -> Any:
        nonlocal dropped
        for row in tables.rows(uri, [*task.columns, task.label]):
            sample = _to_sample(task, row)
            if sample is None:
                dropped += 1
            else:
                yield sample

    samples = choose(good(), size, task.seed)
    return samples, dropped


def choose(items: Iterable[T], size: int | None, seed: int | None) -> list[T]:
    """`size` of the items (all, when None): the first ones, or with a seed random ones."""
    if seed is None:
        return list(islice(items, size))
    every = list(items)
    return [every[i] for i in np.random.default_rng(seed).permutation(len(every))[:size]]


def _to_sample(task: LabelledTask, row: tables.Row) -> Sample | None:
    """None where a text or the label is missing."""
    *parts, label = row.values
    texts = [text_in(part, row, column) for part, column in zip(parts, task.columns, strict=True)]
    name = _label(label, row, task.label)
    if "" in texts or name == "":
        return None
    return (texts[0] if len(texts) == 1 else (texts[0], texts[1])), name


def text_in(value: Any, row: tables.Row, column: str) -> str:
    """The text in a row's column; empty where it is missing.

    Raises:
        InputError: the value is not text.
    """
    text = text_of(value)
    if isinstance(text, str):
        return text
    if text != MISSING:
        raise refusal(text, row.place, column)
    return ""


def full_text(value: Any, row: tables.Row, column: str) -> str:
    """As `text_in`, where a text may not be missing.

    Raises:
        InputError: the value is not text, or one of white space alone.
    """
    text = text_in(value, row, column)
    if not text.strip():
        raise InputError(f"{row.place}: the text in column {column} is empty; remove the row.")
    return text


def _label(value: Any, row: tables.Row, column: str) -> str:
    """The class that a label names, whatever kind of file it stands in: 3, 3.0 and "3.0" are 3. Empty: none."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        if math.isnan(value):  # as numpy and pandas write what is missing
            return ""
        if value.is_integer():
            return str(int(value))
    if isinstance(value, int):
        return str(value)
    if value is not None and not isinstance(value, str | bytes):
        raise InputError(
            f"{row.place}: the label {value!r} is not a class: column {column} must hold integers or strings."
        )
    name = text_in(value, row, column).strip()
    if FLOAT.fullmatch(name):  # csv of a column that was once one of floats
        return str(int(name.partition(".")[0]))
    return name


def _hold_out(task: LabelledTask) -> tuple[list[Sample], list[Sample], int]:
    """Split one set of texts at random; a text that occurs twice is taken once, so it cannot be on both sides."""
    samples, dropped = _sample(task.model_copy(update={"seed": task.seed or 0}), task.train, None)
    unique = list({text: (text, label) for text, label in reversed(samples)}.values())[::-1]
    n_test = task.n_test or max(1, round(TEST_SHARE * len(unique)))
    n_train = task.n_train or len(unique) - n_test
    if n_train < 1 or n_train + n_test > len(unique):
        raise InputError(
            f"The probe task {task.name} asks for {n_train} + {n_test} different texts, but {task.train} has "
            f"{len(unique)}; lower n_train or n_test."
        )
    return unique[:n_train], unique[n_train : n_train + n_test], dropped


def _with_one_spelling(train: list[Sample], test: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Where all classes are true and false, they become 1 and 0, which Parquet and JSON have already made of them."""
    spellings = {label: TRUTH.get(label.lower(), label) for _, label in (*train, *test)}
    if not set(spellings.values()) <= set(TRUTH.values()):
        return train, test
    return [(text, spellings[label]) for text, label in train], [(text, spellings[label]) for text, label in test]


def _class_names(task: LabelledTask, train: list[str], test: list[str]) -> list[str]:
    """The classes of the training texts: integers in their order, else by name."""
    classes = set(train)
    unseen = sorted(set(test) - classes)
    if unseen:
        raise InputError(
            f"The test texts of the probe task {task.name} have classes that no training text has: "
            f"{', '.join(unseen)} (training has {', '.join(_ordered(classes))}){_first_rows(task)}."
        )
    if len(classes) < 2:
        raise InputError(
            f"All training texts of the probe task {task.name} have the same class, {train[0]}{_first_rows(task)}."
        )
    if len(classes) > len(train) // 2:
        raise InputError(
            f"The probe task {task.name} has {len(classes)} classes among {len(train)} training texts; "
            f"is {task.label} its label column?"
        )
    return _ordered(classes)


def _first_rows(task: LabelledTask) -> str:
    """What may be the matter when classes are missing: the rows are sorted by their label."""
    if task.n_train is None or task.seed is not None or task.test is None:
        return ""
    return (
        f"; the first {task.n_train:,} rows of {task.train} were used, which may be sorted by label: set seed in "
        "the task to draw rows at random"
    )


def _ordered(classes: set[str]) -> list[str]:
    numbers = all(INTEGER.fullmatch(name) for name in classes)
    return sorted(classes, key=lambda name: (int(name) if numbers else 0, name))


def _shown(task: LabelledTask, names: list[str]) -> list[str]:
    """The task's own names for labels 0, 1, ...; other labels name themselves."""
    given = dict(enumerate(task.label_names))
    return [given.get(int(name), name) if INTEGER.fullmatch(name) else name for name in names]
