"""One probe: an encoder's vectors of a task's texts, a classifier for each pooling, and the baselines beside them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raybert.encode import POOLINGS, Text
from raybert.encode.encoders import Encoder, Sequences
from raybert.encode.vectors import embed
from raybert.probe import baselines, classify, tune
from raybert.probe.spread import spread
from raybert.probe.tasks import ProbeTask
from raybert.probe.texts import Texts, load_texts

Progress = Callable[[float], None]
Record = dict[str, Any]


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
) -> Record:
    """The probe's record, ready for JSON.

    Returns:
        task, labels, n_train, n_test; for each pooling train_accuracy, test_accuracy, macro_f1, interval (Wilson,
        95 %), confusion, converged and warnings with C = 1, tuned_accuracy, tuned_c and tuned_interval
        (`raybert.probe.tune`), deviation, effective_rank and, of vectors that have collapsed, the sentence collapsed
        (`raybert.probe.spread`); tuning: how C was chosen, or why it was not; baselines: majority, tfidf (one record
        each; the latter may be "absent", with the reason) and untrained (one a pooling); correct and tuned_correct: for
        each pooling which test texts were right, as packed bits in hexadecimal, for paired comparisons; seconds without
        those of the baselines.
    """
    begun = time.perf_counter()
    measured = _measure(encoder, material, device, progress)
    seconds = time.perf_counter() - begun
    texts = material.texts
    untrained_key = f"untrained:{texts.hash}:{encoder.hash}:{material.task.max_tokens}"
    untrained = cache.get(untrained_key, lambda: _measure(encoder.untrained(), material, device, None))
    return {
        "task": material.task.name,
        "title": material.task.title or material.task.name,
        "texts": texts.hash,
        "labels": texts.names,
        **measured,
        "tuning": tune.describe(texts.split(texts.labels)[0], texts.names),
        "baselines": {
            "majority": cache.get(f"majority:{texts.hash}", lambda: baselines.majority(texts)),
            "untrained": _by_pooling(untrained),
            "tfidf": cache.get(f"tfidf:{texts.hash}", lambda: baselines.tfidf(texts)),
        },
        "truncated": material.sequences.truncated,
        "dropped": texts.dropped,
        "seen_in_train": texts.seen_in_train,
        "n_train": texts.n_train,
        "n_test": texts.n_test,
        "seconds": seconds,
    }


def _measure(encoder: Encoder, material: Material, device: torch.device | None, progress: Progress | None) -> Record:
    """An entry for each pooling, and which test texts each got right with C = 1 and tuned."""
    vectors = embed(encoder, material.sequences, device=device, progress=progress)
    train_y, test_y = material.texts.split(material.texts.labels)
    found: Record = {"correct": {}, "tuned_correct": {}}
    for pooling in POOLINGS:
        train_x, test_x = material.texts.split(vectors[pooling])
        score = classify.fit(train_x, train_y, test_x, test_y)
        tuned = tune.tune(train_x, train_y, test_x, test_y, score)
        found[pooling] = score.record() | tuned.record() | spread(vectors[pooling]).record()
        if pooling in encoder.warnings:
            found[pooling]["warnings"].insert(0, encoder.warnings[pooling])
        found["correct"][pooling] = pack_bits(score.predictions == test_y)
        found["tuned_correct"][pooling] = pack_bits(tuned.predictions == test_y)
    return found


def _by_pooling(measured: Record) -> Record:
    return {pooling: measured[pooling] for pooling in POOLINGS}


def pack_bits(flags: np.ndarray) -> str:
    """(N,) booleans as hexadecimal digits."""
    return np.packbits(flags).tobytes().hex()


def unpack_bits(digits: str, n: int) -> np.ndarray:
    """The N booleans that `pack_bits` was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=n).astype(bool)
