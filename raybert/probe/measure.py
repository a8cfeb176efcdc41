"""One pass of an encoder over the texts of one task or of several that share texts, block by block.

What is in memory at a time does not grow with the number of texts but by what a kind's collector keeps.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raybert.encode import POOLINGS, Text
from raybert.encode.encoders import Encoder, Sequences
from raybert.encode.vectors import embed, part
from raybert.errors import InputError, RunFailed
from raybert.probe import kinds
from raybert.probe.kind import Data, ProbeTask, Record, TrainedKind, VectorKind, leading

BLOCK_BYTES = 64 * 2**20  # of all poolings' vectors
TOKENISED_AT_ONCE = 20_000  # texts; their ids are Python objects until they are packed

Tokenize = Callable[[Sequence[Text], int], Sequences]


@dataclass(frozen=True)
class Material:
    """A task made ready for encoders that share a tokenizer: what every probe of it has in common."""

    task: ProbeTask
    data: Any
    sequences: Sequences


def prepare(task: ProbeTask, tokenize: Tokenize, positions: int) -> Material:
    """Read, sample and tokenise the task's texts for an encoder of so many positions.

    Raises:
        InputError: as `Kind.read`; or a text holds no token.
    """
    data = kinds.of_task(task).read(task)
    return Material(task, data, _tokenize(task, data, tokenize, min(task.max_tokens, positions)))


def measure(
    encoder: Encoder,
    materials: Sequence[Material],
    device: torch.device | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Record]:
    """Of each task what its kind finds; a task that trains the encoder has to be alone.

    Sequences that several tasks hold are encoded once.

    Raises:
        RunFailed: a vector is not finite; or as `train`.
    """
    collectors = []
    for material in materials:
        kind = kinds.of_task(material.task)
        if isinstance(kind, TrainedKind):
            assert len(materials) == 1
            return [join(material, [train(encoder, material, i, device, progress) for i in range(kind.trainings)])]
        assert isinstance(kind, VectorKind)
        collectors.append(kind.collector(material.data))
    sequences, places = _union(materials)
    size = max(1, BLOCK_BYTES // (len(POOLINGS) * 4 * encoder.hidden_size))
    count = len(sequences.cuts)
    for first in range(0, count, size):
        last = min(first + size, count)

        def said(share: float, first: int = first, last: int = last) -> None:
            if progress is not None:
                progress((first + share * (last - first)) / count)

        vectors = embed(encoder, part(sequences, first, last), device=device, progress=said)
        if wrong := [name for name, found in vectors.items() if not np.isfinite(found).all()]:
            raise RunFailed(f"The encoder's vectors ({wrong[0]}) are not finite, so they cannot be evaluated.")
        for collector, place in zip(collectors, places, strict=True):
            rows = np.flatnonzero((place >= first) & (place < last))
            if np.array_equal(place[rows], np.arange(first, last)):
                collector.add(rows, vectors)  # without a copy
            elif len(rows):
                collector.add(rows, {name: found[place[rows] - first] for name, found in vectors.items()})
        del vectors  # before there are those of the next block
    found = [collector.finish() for collector in collectors]
    for record in found:
        for pooling, warning in encoder.warnings.items():
            record[pooling].setdefault("warnings", []).insert(0, warning)
    return found


def train(
    encoder: Encoder,
    material: Material,
    number: int,
    device: torch.device | None = None,
    progress: Callable[[float], None] | None = None,
) -> Record:
    """Training `number` of a task whose kind trains the encoder: `TrainedKind.train`, and its seconds.

    Args:
        progress: called with the finished fraction of all trainings, as if those before this one were done.

    Raises:
        RunFailed: as `TrainedKind.train`.
    """
    kind, begun = kinds.of_task(material.task), time.perf_counter()
    assert isinstance(kind, TrainedKind)

    def said(share: float) -> None:
        if progress is not None:
            progress((number + share) / kind.trainings)

    found = kind.train(number, encoder, material.data, material.sequences, device, said)
    return {**found, "seconds": time.perf_counter() - begun}


def join(material: Material, trained: Sequence[Record]) -> Record:
    """What the kind of a task finds in all of its trainings, which may have been done elsewhere."""
    kind = kinds.of_task(material.task)
    assert isinstance(kind, TrainedKind)
    return kind.join(material.data, trained)


def _union(materials: Sequence[Material]) -> tuple[Sequences, list[np.ndarray]]:
    """The sequences of all tasks, each once, and where those of each task stand among them: first what a task wants
    first. Those of one task alone are left as they are."""
    if len(materials) == 1:
        sequences = materials[0].sequences
        return sequences, [np.arange(len(sequences.cuts))]
    keys = [digests(material.sequences) for material in materials]
    heads = [leading(material.data) for material in materials]
    owners = np.concatenate([np.full(len(key), number) for number, key in enumerate(keys)])
    rows = np.concatenate([np.arange(len(key)) for key in keys])
    late = np.concatenate([np.arange(len(key)) >= head for key, head in zip(keys, heads, strict=True)])
    order = np.argsort(late, kind="stable")
    every = np.concatenate(keys)[order]
    _, first, inverse = np.unique(every, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    places = np.empty(len(every), dtype=np.int64)
    places[order] = rank[inverse.reshape(-1)]
    chosen = order[np.sort(first)]
    parts = [_row(materials[owners[i]].sequences, rows[i]) for i in chosen]
    lengths = np.array([len(part) for part in parts])
    union = Sequences(
        ids=np.concatenate(parts),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        cuts=np.array([materials[owners[i]].sequences.cuts[rows[i]] for i in chosen], dtype=np.int32),
        truncated=0,
    )
    return union, np.split(places, np.cumsum([len(key) for key in keys])[:-1])


def _row(sequences: Sequences, row: int) -> np.ndarray:
    return sequences.ids[sequences.offsets[row] : sequences.offsets[row + 1]]


def digests(sequences: Sequences) -> np.ndarray:
    """Identity of each sequence, (N,) of 16 bytes."""
    found = (
        hashlib.blake2b(_row(sequences, row).tobytes() + int(cut).to_bytes(4, "little"), digest_size=16).digest()
        for row, cut in enumerate(sequences.cuts)
    )
    return np.frombuffer(b"".join(found), dtype="V16")


def _tokenize(task: ProbeTask, data: Data, tokenize: Tokenize, max_tokens: int) -> Sequences:
    """In parts, so that no list of all ids is ever made.

    Raises:
        InputError: a text that is not one of a classification holds no token.
    """
    parts = []
    for first in range(0, len(data.texts), TOKENISED_AT_ONCE):
        texts = data.texts[first : first + TOKENISED_AT_ONCE]
        part = tokenize(texts, max_tokens)
        shortest, specials = int(part.lengths.argmin()), 2 if isinstance(texts[0], str) else 3
        # A text of many that are classified may say nothing; one of a pair or a query cannot be judged.
        if task.kind != kinds.DEFAULT and part.lengths[shortest] <= specials:
            raise InputError(
                f"A text of the probe task {task.name} contains no token that the encoder knows: {texts[shortest]!r}."
            )
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    lengths, cuts = (np.concatenate(each) for each in zip(*((part.lengths, part.cuts) for part in parts), strict=True))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    truncated, ids, first = sum(part.truncated for part in parts), np.empty(offsets[-1], dtype=np.int32), 0
    while parts:  # one after the other is given up, so that they are not all there twice
        part = parts.pop(0)
        ids[first : first + len(part.ids)] = part.ids
        first += len(part.ids)
    return Sequences(ids, offsets, cuts, truncated)
