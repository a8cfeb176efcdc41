"""One probe: an encoder's vectors of a task's texts, what the task's kind makes of them, and the baselines beside."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from raybert.encode import POOLINGS, Text
from raybert.encode.encoders import Encoder, Sequences
from raybert.encode.vectors import embed
from raybert.probe import baselines, kinds
from raybert.probe.kind import Data, ProbeTask, Record

Progress = Callable[[float], None]
# What a run began with: its probe record, or "untrained" where the weights were random, as the untrained encoder's are.
Start = Record | Literal["untrained"]


@dataclass(frozen=True)
class Material:
    """A task made ready for encoders that share a tokenizer: what every probe of it has in common."""

    task: ProbeTask
    data: Data
    sequences: Sequences


def prepare(task: ProbeTask, tokenize: Callable[[Sequence[Text], int], Sequences], positions: int) -> Material:
    """Read, sample and tokenise the task's texts for an encoder of so many positions.

    Raises:
        InputError: as `Kind.read`.
    """
    data = kinds.of_task(task).read(task)
    return Material(task, data, tokenize(data.texts, min(task.max_tokens, positions)))


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
        task, title, kind (but for classification, whose records began without); what the kind says of the texts
        (`Kind.about`); for each pooling an entry with the kind's figures, and the evidence for paired comparisons
        (`Kind.judge`); baselines: what the kind names (one record each; one may be "absent", with the reason) and
        untrained (one a pooling); seconds without those of the baselines. With a start also baselines.start (one a
        pooling, or "absent" with the reason), and beyond_start: `Kind.difference` to the start for each pooling.
    """
    begun = time.perf_counter()
    measured = _measure(encoder, material, device, progress)
    seconds = time.perf_counter() - begun
    task, data, kind = material.task, material.data, kinds.of_task(material.task)
    untrained_key = f"untrained:{data.hash}:{encoder.hash}:{task.max_tokens}"
    untrained = cache.get(untrained_key, lambda: _measure(encoder.untrained(), material, device, None))
    plain = {name: cache.get(f"{name}:{data.hash}", compute) for name, compute in kind.baselines(data).items()}
    about = {"texts": data.hash, **kind.about(data)}
    record = {
        "task": task.name,
        "title": task.title or task.name,
        **({"kind": kind.name} if kind.name != kinds.DEFAULT else {}),
        **about,
        **measured,
        "baselines": {**plain, "untrained": _by_pooling(untrained)},
        "truncated": material.sequences.truncated,
        "seconds": seconds,
    }
    if start is not None:
        add_start(record, {**untrained, **about} if start == "untrained" else start)
    return record


def add_start(record: Record, start: Record) -> None:
    """Put the start's figures beside the record's other baselines, and how far the record is beyond them."""
    kind = kinds.of_record(record)
    assert kind is not None
    if start.get("status", "done") != "done":
        record["baselines"]["start"] = {"absent": start.get("reason", "it has no result")}
    elif start.get("texts") != record["texts"]:
        record["baselines"]["start"] = {"absent": "the start was probed with other texts"}
    else:
        record["baselines"]["start"] = _by_pooling(start)
        record["beyond_start"] = {
            pooling: kind.difference(start, record, pooling) for pooling in kinds.poolings(record) if pooling in start
        }


def _measure(encoder: Encoder, material: Material, device: torch.device | None, progress: Progress | None) -> Record:
    """An entry for each pooling, and the evidence for comparisons."""
    vectors = embed(encoder, material.sequences, device=device, progress=progress)
    found = kinds.of_task(material.task).judge(material.data, vectors)
    for pooling, warning in encoder.warnings.items():
        found[pooling].setdefault("warnings", []).insert(0, warning)
    return found


def _by_pooling(measured: Record) -> Record:
    return {name: entry for name, entry in measured.items() if name in POOLINGS}
