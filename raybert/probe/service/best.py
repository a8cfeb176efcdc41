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
    """Copy the weights of an entry whose metric is recorded, if it is higher than that of the best.

    The start (step 0) is never kept. A run that goes on with another metric begins anew, and what was asked for before
    says nothing about it. Called again, it does the same again, as long as the weights are there.
    """
    task = next((task.name for task in entry.tasks if metrics.of_task(entry.best, task.name)), None)
    if task is None or entry.step == 0:
        return
    record = queue.read_record(entry.run_uri, task, entry.step)
    value = metrics.value(entry.best, record) if record is not None else None
    if value is None or entry.best != load_run(entry.run_uri).checkpoint.best:
        return
    before = read(entry.run_uri, entry.best)
    if before is not None and value <= before[1]:
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
    """Copy a directory of weights, complete or not at all.

    Until it is complete the copy lies with the weights. A run that is started again meanwhile removes what it finds
    incomplete among its checkpoints; what a service that was killed has left goes with the weights.
    """
    names = list(read_sums(weights))  # beside them lies what probes keep
    workplace = weights if _one_disk(weights, target) else ""
    with storage.local_copy(weights, names) as source:

        def fill(directory: Path) -> None:
            for name in names:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, directory / name)

        write_directory(target, fill, workplace=workplace)


def _one_disk(weights: str, target: str) -> bool:
    """Whether a directory can be renamed from one to the other: RUN/checkpoints may be a link to somewhere else."""
    if storage.is_remote(target):
        return False
    place = Path(target).parent
    place.mkdir(parents=True, exist_ok=True)
    return place.stat().st_dev == Path(weights).stat().st_dev
