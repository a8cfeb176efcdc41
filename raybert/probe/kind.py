"""What a kind of probe task is. Each kind is one module that fills this interface.

    settings    a pydantic model below `ProbeTask`: what a task of the kind may say in its YAML file
    read        the task's texts and what they are judged by, read and sampled once, without an encoder
    judge       vectors of those texts -> figures for each pooling, and the evidence that comparisons need; or `train`
    baselines   figures without any encoder, computed once and kept
    headline    the figure that is plotted, tracked and compared

`raybert.probe.kinds` lists them.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from raybert import storage
from raybert.data.text.values import refuse_twins
from raybert.encode import POOLINGS, Text
from raybert.errors import InputError
from raybert.probe import tables

TASK_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
FEWEST = 20  # pairs, queries or spans: with fewer no figure says anything

Record = dict[str, Any]
Vectors = Mapping[str, np.ndarray]  # by pooling, float32 (N, D)


class ProbeTask(BaseModel):
    """The settings that tasks of every kind have."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    URIS: ClassVar[tuple[str, ...]] = ()  # the keys that name files

    kind: str
    name: Annotated[str, Field(pattern=TASK_NAME, description="name of the task, part of its records' file names")]
    title: str = Field(default="", description="title in reports; by default the name")
    max_tokens: int = Field(default=256, ge=8, description="cut texts to this many tokens, special tokens included")

    @field_validator("*")
    @classmethod
    def _absolute(cls, value: Any, info: Any) -> Any:
        """Ray's workers run in other directories than the command that names the file."""
        return storage.absolute(value) if info.field_name in cls.URIS and value is not None else value

    @property
    def files(self) -> list[tuple[str, list[str]]]:
        """Every URI that is read, with the columns that it must have."""
        return []

    def stamps(self) -> list[str]:
        """What is behind the URIs now; it changes with them."""
        return [tables.stamp(uri) for uri, _ in self.files]

    @property
    def hash(self) -> str:
        """Identity of the task as it is written down (not of the texts behind the URIs)."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class Data(Protocol):
    """A task's texts as `Kind.read` returns them, with what else the kind needs."""

    @property
    def texts(self) -> Sequence[Text]:
        """In the order in which `judge` takes their vectors."""
        ...

    @property
    def hash(self) -> str:
        """Of all that the figures depend on but the encoder."""
        ...


def leading(data: Data) -> int:
    """How many of the texts have to be encoded before the others."""
    return int(getattr(data, "leading", 0))


@dataclass(frozen=True)
class Headline:
    """The main metric of a kind, in 0..1 or -1..1, the higher the better; it is shown times 100."""

    key: str  # in a pooling's entry of a record
    title: str
    short: str  # the head of a column
    share: bool  # of texts, so that it is shown in per cent
    others: Mapping[str, str]  # keys of the figures beside it, and the heads of their columns
    method: str  # how vectors become figures, in a clause

    @property
    def unit(self) -> str:
        return " %" if self.share else ""

    @property
    def label(self) -> str:
        """The title of figures that are shown times 100."""
        return self.title if self.share else f"{self.title} x 100"

    def of(self, entry: Any) -> float | None:
        """The headline of a pooling's entry; None where it has none."""
        value = entry.get(self.key) if isinstance(entry, Mapping) else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class Collector(ABC):
    """Takes a task's vectors as they are made, so that they need not all be in memory."""

    @abstractmethod
    def add(self, rows: np.ndarray, vectors: Vectors) -> None:
        """Vectors of the texts with these numbers. The `leading` texts come before all others."""

    @abstractmethod
    def finish(self) -> Record:
        """What `VectorKind.judge` returns, when every text has come."""


class Whole(Collector):
    """Keeps all vectors for `VectorKind.judge`."""

    def __init__(self, kind: "VectorKind", data: Data) -> None:
        self._kind, self._data = kind, data
        self._kept: dict[str, np.ndarray] = {}

    def add(self, rows: np.ndarray, vectors: Vectors) -> None:
        for pooling, found in vectors.items():
            if len(rows) == len(self._data.texts):
                self._kept[pooling] = found
                continue
            if pooling not in self._kept:
                self._kept[pooling] = np.empty((len(self._data.texts), found.shape[1]), dtype=np.float32)
            self._kept[pooling][rows] = found

    def finish(self) -> Record:
        return self._kind.judge(self._data, self._kept)


class Kind(ABC):
    """One kind of task; see the module's docstring. Nothing in it holds state."""

    name: ClassVar[str]
    settings: ClassVar[type[ProbeTask]]
    headline: ClassVar[Headline]
    costly: ClassVar[bool] = False  # its probes wait until no others do
    counted: ClassVar[str]  # what a record's n_test is a number of

    @abstractmethod
    def read(self, task: Any) -> Any:
        """The task's data. The same files give the same data, always.

        Raises:
            InputError: one sentence on the first thing that is wrong with them.
        """

    @abstractmethod
    def about(self, data: Any) -> Record:
        """What a record says of the data: counts, names, how the figures were made."""

    @abstractmethod
    def baselines(self, data: Any) -> Mapping[str, Callable[[], Record]]:
        """What needs no encoder, by name: an entry with the headline, or "absent" with the reason."""

    @abstractmethod
    def difference(self, a: Record, b: Record, pooling: str) -> Record:
        """The headline of B minus that of A on the same texts: difference, interval (95 %), p_value."""

    @abstractmethod
    def lacks(self, record: Record) -> str:
        """Why a finished record cannot be compared; empty where it can."""

    @abstractmethod
    def summary(self, record: Mapping[str, Any]) -> str:
        """What the figures stand on, for a caption: how many texts of which sort, judged how."""

    @abstractmethod
    def held_out(self, task: Any) -> Iterable[str]:
        """The texts that must not be trained on."""

    def poolings(self, task: Any) -> Sequence[str]:
        """Those that a record of the task has an entry for."""
        return POOLINGS

    def check(self, task: ProbeTask) -> None:
        """All that can be known before anything is trained.

        Raises:
            InputError: no file, a missing column, no network for a data set on the Hub, or data that cannot be judged.
        """
        check_files(task)

    def compare(self, a: Record, b: Record, pooling: str) -> Record:
        """`difference` with both headlines beside it, as a and b."""
        sides = {side: self.headline.of(record[pooling]) for side, record in (("a", a), ("b", b))}
        return self.difference(a, b, pooling) | sides


class VectorKind(Kind):
    """A kind that judges frozen vectors, so that several tasks can share a pass of the encoder."""

    @abstractmethod
    def judge(self, data: Any, vectors: Vectors) -> Record:
        """An entry for each pooling with the headline and what stands beside it, and the evidence of comparisons."""

    def collector(self, data: Any) -> Collector:
        """What takes the vectors of the data, block by block."""
        return Whole(self, data)


class TrainedKind(Kind):
    """A kind that trains copies of the encoder, so that its probes take long. The trainings need nothing of each other:
    they may run in processes of their own."""

    costly = True
    trainings: ClassVar[int]

    @abstractmethod
    def train(self, number: int, encoder: Any, data: Any, sequences: Any, device: Any, progress: Any) -> Record:
        """Train a copy of the encoder on the data's `sequences`: what `join` needs of training `number`, for JSON.

        Args:
            progress: called with the finished fraction of this training.

        Raises:
            RunFailed: its time limit was reached before there was a result, or it diverged.
        """

    @abstractmethod
    def join(self, data: Any, trained: Sequence[Record]) -> Record:
        """What `VectorKind.judge` returns, from all trainings in their order."""

    @abstractmethod
    def cut_short(self, trained: Record) -> bool:
        """Whether a training stopped before its last step, so that a retry may get further."""


def check_files(task: ProbeTask) -> None:
    """Look at the first file of each URI.

    Raises:
        InputError: no file, a missing column, or no network for a data set on the Hub.
    """
    for uri, wanted in task.files:
        try:
            found = tables.columns(uri)
        except Exception as error:  # of whatever client serves the URI
            if uri.startswith("hf://"):
                fault = type(error.__cause__ or error).__name__
                raise InputError(
                    f"The probe task {task.name} is downloaded from the Hugging Face Hub, which needs a network "
                    f"and pip install 'raybert[hub]' ({fault}); or name it as {task.name}@URI, the directory with "
                    "its train and test parquet files, or give a task's YAML file."
                ) from error
            if isinstance(error, InputError):
                raise
            raise InputError(f"{uri} of the probe task {task.name} cannot be read: {error}.") from error
        missing = [column for column in wanted if column not in found]
        if missing:
            raise InputError(
                f"{uri} has no column {missing[0]} for the probe task {task.name}; it has {', '.join(found)}."
            )
        refuse_twins(uri, found, wanted)


def digest(*parts: object) -> str:
    """SHA-256 over the parts as Python writes them, a list element by element; lone surrogates count, too."""
    found = hashlib.sha256()
    for part in parts:
        for piece in _written(part) if isinstance(part, list) else (repr(part),):
            found.update(piece.encode("utf-8", "surrogatepass"))
        found.update(b"\0")
    return found.hexdigest()


def _written(items: list[Any]) -> Iterator[str]:
    """The pieces of `repr(items)`: of a million texts it would be as large as they are."""
    yield "["
    for number, item in enumerate(items):
        yield f", {item!r}" if number else repr(item)
    yield "]"


def pack_floats(values: np.ndarray) -> str:
    """(N,) figures, a text or a pair each, as hexadecimal digits of float32."""
    return np.ascontiguousarray(values, dtype="<f4").tobytes().hex()


def unpack_floats(digits: str) -> np.ndarray:
    """What `pack_floats` was given, float64 (N,)."""
    return np.frombuffer(bytes.fromhex(digits), dtype="<f4").astype(np.float64)


def lacks_evidence(record: Record, names: Iterable[str]) -> str:
    """`Kind.lacks` for records whose "evidence" holds a float under each of the names for each of the n_test things."""
    digits, found = 8 * (record.get("n_test") or 0), record.get("evidence", {})
    if not digits or not found or any(len(found.get(name, "")) != digits for name in names):
        return "it has no figures for individual texts"
    return "" if record.get("texts") else "a part of the result is missing"
