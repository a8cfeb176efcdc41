"""One probe: an encoder's vectors of a task's texts, a classifier for each pooling, and the baselines beside them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from raybert.encode import POOLINGS, Text
from raybert.encode.encoders import Encoder, Sequences
from raybert.encode.vectors import embed
from raybert.probe import baselines, classify, tune
from raybert.probe.spread import spread
from raybert.probe.statistics import paired_bootstrap
from raybert.probe.tasks import ProbeTask
from raybert.probe.texts import Texts, load_texts

Progress = Callable[[float], None]
Record = dict[str, Any]
# What a run began with: its probe record, or "untrained" where the weights were random, as the untrained encoder's are.
Start = Record | Literal["untrained"]


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
    start: Start | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Record:
    """The probe's record, ready for JSON.

    Args:
        start: what the run began with, measured by the same task; None where there is no run.

    Returns:
        task, labels, n_train, n_test; for each pooling train_accuracy, test_accuracy, macro_f1, interval (Wilson,
        95 %), confusion, converged and warnings with C = 1, tuned_accuracy, tuned_c and tuned_interval
        (`raybert.probe.tune`), deviation, effective_rank and, of vectors that have collapsed, the sentence collapsed
        (`raybert.probe.spread`); tuning: how C was chosen, or why it was not; baselines: majority, tfidf (one record
        each; the latter may be "absent", with the reason) and untrained (one a pooling); correct and tuned_correct: for
        each pooling which test texts were right, as packed bits in hexadecimal, for paired comparisons; seconds without
        those of the baselines. With a start also baselines.start (one a pooling, or "absent" with the reason), and
        beyond_start: for each pooling the accuracy minus the start's with its 95 % interval, p_value and counts (see
        `paired_bootstrap`), and the same of the tuned figures under tuned.
    """
    begun = time.perf_counter()
    measured = _measure(encoder, material, device, progress)
    seconds = time.perf_counter() - begun
    texts = material.texts
    untrained_key = f"untrained:{texts.hash}:{encoder.hash}:{material.task.max_tokens}"
    untrained = cache.get(untrained_key, lambda: _measure(encoder.untrained(), material, device, None))
    record = {
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
    if start is not None:
        add_start(record, {**untrained, "texts": texts.hash} if start == "untrained" else start)
    return record


def add_start(record: Record, start: Record) -> None:
    """Put the start's figures beside the record's other baselines, and how far the record is beyond them."""
    if start.get("status", "done") != "done":
        record["baselines"]["start"] = {"absent": start.get("reason", "it has no result")}
    elif start.get("texts") != record["texts"]:
        record["baselines"]["start"] = {"absent": "the start was probed with other texts"}
    else:
        record["baselines"]["start"] = _by_pooling(start)
        record["beyond_start"] = {
            pooling: _beyond(start, record, pooling, "correct")
            | {"tuned": _beyond(start, record, pooling, "tuned_correct")}
            for pooling in POOLINGS
        }


def _beyond(start: Record, record: Record, pooling: str, key: str) -> Record:
    before, now = (unpack_bits(one[key][pooling], record["n_test"]) for one in (start, record))
    return asdict(paired_bootstrap(before, now))


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
