"""One probe: an encoder's vectors of a task's texts, a classifier for each pooling, and the baselines beside them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from raybert.encode import POOLINGS, Text
from raybert.encode.encoders import Encoder, Sequences
from raybert.encode.vectors import embed
from raybert.probe import baselines, classify
from raybert.probe.tasks import ProbeTask
from raybert.probe.texts import Texts, load_texts

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Material:
    """A task made ready for encoders that share a tokenizer: what every probe of it has in common."""

    task: ProbeTask
    texts: Texts
    sequences: Sequences


def prepare(task: ProbeTask, tokenize: Callable[[Sequence[Text], int], Sequences], positions: int) -> Material:
    """Read, sample and tokenise the task's texts for an encoder of so many positions.

    Raises:
        InputError: as `load_texts`.
    """
    texts = load_texts(task)
    return Material(task, texts, tokenize(texts.texts, min(task.max_tokens, positions)))


def evaluate(
    encoder: Encoder,
    material: Material,
    cache: baselines.Cache,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The probe's record, ready for JSON.

    Returns:
        task, labels, n_train, n_test; for each pooling train_accuracy, test_accuracy, macro_f1, interval (Wilson,
        95 %), confusion, converged and warnings; baselines: majority, tfidf (one record each; the latter may be
        "absent", with the reason) and untrained (one a pooling); correct: for each pooling which test texts were
        right, as packed bits in hexadecimal, for paired comparisons; seconds without those of the baselines.
    """
    start = time.perf_counter()
    scores = _scores(encoder, material, device, progress)
    seconds = time.perf_counter() - start
    texts = material.texts
    test_y = texts.split(texts.labels)[1]
    untrained_key = f"untrained:{texts.hash}:{encoder.hash}:{material.task.max_tokens}"

    def untrained() -> dict[str, Any]:
        scores = _scores(encoder.untrained(), material, device, None)
        return {name: score.record() for name, score in scores.items()}

    return {
        "task": material.task.name,
        "title": material.task.title or material.task.name,
        "texts": texts.hash,
        "labels": texts.names,
        **{name: score.record() for name, score in scores.items()},
        "baselines": {
            "majority": cache.get(f"majority:{texts.hash}", lambda: baselines.majority(texts)),
            "untrained": cache.get(untrained_key, untrained),
            "tfidf": cache.get(f"tfidf:{texts.hash}", lambda: baselines.tfidf(texts)),
        },
        "correct": {name: pack_bits(score.predictions == test_y) for name, score in scores.items()},
        "truncated": material.sequences.truncated,
        "dropped": texts.dropped,
        "seen_in_train": texts.seen_in_train,
        "n_train": texts.n_train,
        "n_test": texts.n_test,
        "seconds": seconds,
    }


def _scores(
    encoder: Encoder, material: Material, device: torch.device | None, progress: Progress | None
) -> dict[str, classify.Score]:
    vectors = embed(encoder, material.sequences, device=device, progress=progress)
    train_y, test_y = material.texts.split(material.texts.labels)
    found = {}
    for pooling in POOLINGS:
        train_x, test_x = material.texts.split(vectors[pooling])
        score = classify.fit(train_x, train_y, test_x, test_y)
        notes = [encoder.warnings[pooling]] if pooling in encoder.warnings else []
        found[pooling] = replace(score, warnings=[*notes, *score.warnings])
    return found


def pack_bits(flags: np.ndarray) -> str:
    """(N,) booleans as hexadecimal digits."""
    return np.packbits(flags).tobytes().hex()


def unpack_bits(digits: str, n: int) -> np.ndarray:
    """The N booleans that `pack_bits` was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=n).astype(bool)
