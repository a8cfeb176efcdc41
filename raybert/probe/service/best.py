"""RUN/checkpoints/best where a probe says which weights are the best; RUN/probes/best.json says which those are."""

import shutil
from contextlib import suppress
from pathlib import Path

from raybert import storage
from raybert.config import load_run
from raybert.errors import DamagedCheckpoint
from raybert.model.directory import CONFIG, WEIGHTS, read_sums, verify_files, write_directory
from raybert.probe import metrics
from raybert.probe.service import queue
from raybert.probe.service.queue import Entry
from raybert.records import is_count, is_number, read_object


def keep(entry: Entry) -> None:
    """Copy the weights of an entry whose tasks all have their records, if its metric is higher than that of the best.

    The start (step 0) is never kept. A run that goes on with another metric begins anew, and what was asked of before
    says nothing of it. Called again, it does the
    same again, as long as the weights are there.
    """
    if not entry.best or entry.step == 0 or entry.best != load_run(entry.run_uri).checkpoint.best:
        return
    records = [queue.read_record(entry.run_uri, task.name, entry.step) for task in entry.tasks]
    values = [metrics.value(entry.best, record) for record in records if record is not None]
    value = next((value for value in values if value is not None), None)
    before = read(entry.run_uri, entry.best)
    if value is None or (before is not None and value <= before[1]):
        return
    try:
        verify_files(entry.weights, required=(CONFIG, WEIGHTS))
    except DamagedCheckpoint:
        return
    _copy(entry.weights, storage.join(entry.run_uri, "checkpoints", "best"))
    storage.write_json(_uri(entry.run_uri), {"metric": entry.best, "step": entry.step, "value": value})


def read(run_uri: str, metric: str) -> tuple[int, float] | None:
    """Step and value of the run's best weights by this metric; None while there are none."""
    with suppress(FileNotFoundError, ValueError):
        found = read_object(_uri(run_uri))
        step, value = found.get("step"), found.get("value")
        if found.get("metric") == metric and is_count(step) and is_number(value):
            return int(step), float(value)  # type: ignore[arg-type]
    return None


def forget(run_uri: str) -> bool:
    """Of a run that goes on and keeps its best weights itself: whether a probe said until now which those are."""
    there = storage.exists(_uri(run_uri))
    if there:
        storage.remove(_uri(run_uri))
    return there


def _uri(run_uri: str) -> str:
    return storage.join(run_uri, "probes", "best.json")


def _copy(weights: str, target: str) -> None:
    """Copy a directory of weights, complete or not at all."""
    names = list(read_sums(weights))  # beside them lies what probes keep
    with storage.local_copy(weights, names) as source:

        def fill(directory: Path) -> None:
            for name in names:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, directory / name)

        write_directory(target, fill)
