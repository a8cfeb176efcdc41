"""One probe: what a task's kind makes of an encoder's vectors, and the baselines beside it."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch

from raybert.encode import POOLINGS
from raybert.encode.encoders import Encoder
from raybert.errors import RunFailed
from raybert.probe import baselines, kinds
from raybert.probe.kind import Record, TrainedKind
from raybert.probe.measure import Material, join, measure, prepare, train

__all__ = ["Material", "Start", "evaluate", "evaluate_all", "prepare"]

Progress = Callable[[float], None]
# What a run began with: its probe record, or "untrained" where the weights were random, as the untrained encoder's are.
Start = Record | Literal["untrained"]


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
        start: the record of the run's start by the same task; None without a run.

    Returns:
        task, title, kind (but for classification, whose records began without); what the kind says of the texts
        (`Kind.about`); for each pooling an entry with the kind's figures, and the evidence for paired comparisons
        (`Kind.judge`); baselines: what the kind names (one record each; one may be "absent", with the reason) and
        untrained (one a pooling, or "absent" with the reason); seconds without those of the baselines. With a start
        also baselines.start, as untrained, and beyond_start: `Kind.difference` to the start for each pooling.

    Raises:
        RunFailed: as `raybert.probe.measure.measure`.
    """
    return evaluate_all(encoder, [material], cache, starts=[start], device=device, progress=progress)[0]


def evaluate_all(
    encoder: Encoder,
    materials: Sequence[Material],
    cache: baselines.Cache,
    *,
    starts: Sequence[Start | None],
    device: torch.device | None = None,
    progress: Progress | None = None,
    trained: Sequence[Record] | None = None,
    of_run: baselines.Cache | None = None,
) -> list[Record]:
    """`evaluate` of several tasks in one pass of the encoder; each record's seconds are its share by texts.

    Args:
        trained: what `raybert.probe.measure.train` found in all trainings of the one task, where they were done before.
        of_run: keeps a baseline that its budget cut short, so that the probes of one run train it once.
    """
    begun = time.perf_counter()
    measured = [join(materials[0], trained)] if trained else measure(encoder, materials, device, progress)
    seconds = time.perf_counter() - begun + sum(each["seconds"] for each in trained or ())
    total = sum(len(material.data.texts) for material in materials)
    records = []
    for material, own, start in zip(materials, measured, starts, strict=True):
        task, data, kind = material.task, material.data, kinds.of_task(material.task)
        untrained = _untrained(encoder, material, cache, device, of_run)
        plain = {name: cache.get(f"{name}:{data.hash}", compute) for name, compute in kind.baselines(data).items()}
        about = {"texts": data.hash, **kind.about(data)}
        record = {
            "task": task.name,
            "title": task.title or task.name,
            **({"kind": kind.name} if kind.name != kinds.DEFAULT else {}),
            **about,
            **own,
            "baselines": {**plain, "untrained": _by_pooling(untrained)},
            "truncated": material.sequences.truncated,
            "seconds": seconds * len(data.texts) / total,
        }
        if start is not None:
            add_start(record, {**untrained, **about} if start == "untrained" else start)
        records.append(record)
    return records


def _untrained(
    encoder: Encoder,
    material: Material,
    cache: baselines.Cache,
    device: torch.device | None,
    of_run: baselines.Cache | None,
) -> Record:
    """What the same encoder has before any training; or "absent" with the reason.

    A training that its budget cut short may come further another time, so only its run keeps it.
    """
    kind = kinds.of_task(material.task)
    key = f"untrained:{material.data.hash}:{encoder.hash}:{material.task.max_tokens}"
    if not isinstance(kind, TrainedKind):
        try:
            return cache.get(key, lambda: measure(encoder.untrained(), [material], device)[0])
        except RunFailed as error:
            return {"absent": str(error)}
    found: list[Record] = []

    def cut_short(each: Record) -> bool:
        return "absent" in each or kind.cut_short(each)

    for number in range(kind.trainings):
        name, compute = f"{key}:{number}", partial(_train_untrained, encoder, material, number, device)
        if of_run is not None:
            compute = partial(of_run.get, name, compute, keep=cut_short)
        each = cache.get(name, compute, keep=lambda each: not cut_short(each))
        if "absent" in each:
            return each
        found.append(each)
    return join(material, found)


def _train_untrained(encoder: Encoder, material: Material, number: int, device: torch.device | None) -> Record:
    """As `train`; or "absent" with the sentence that says how far it came."""
    try:
        return train(encoder.untrained(), material, number, device)
    except RunFailed as error:
        return {"absent": str(error)}


def add_start(record: Record, start: Record) -> None:
    """Put the start's figures beside the record's other baselines, and how far the record is beyond them."""
    kind = kinds.of_record(record)
    assert kind is not None
    if "absent" in start:
        record["baselines"]["start"] = {"absent": start["absent"]}
    elif start.get("status", "done") != "done":
        record["baselines"]["start"] = {"absent": start.get("reason", "it has no result")}
    elif start.get("texts") != record["texts"]:
        record["baselines"]["start"] = {"absent": "the start was probed with different texts"}
    else:
        record["baselines"]["start"] = _by_pooling(start)
        record["beyond_start"] = {
            pooling: kind.difference(start, record, pooling) for pooling in kinds.poolings(record) if pooling in start
        }


def _by_pooling(measured: Record) -> Record:
    """The entries of the poolings; or why there are none."""
    return {name: entry for name, entry in measured.items() if name in (*POOLINGS, "absent")}
