"""The probe queue of a run, as objects in storage: what waits, what came of it, and how each entry ends.

    RUN/probes/queue/step-00000200.json     waiting or running: the tasks, where the weights are
    RUN/probes/weights/step-00000200/       a copy of the weights that checkpoint retention never reaches
    RUN/probes/TASK-00000200.json           the record: a result, or why there is none
    RUN/probes/service.json                 which probe service serves this run

An entry exists before its submission is acknowledged. It is removed last: after a record for each of its tasks is
written and the weights are gone. So whatever is killed in between, the entry is either found again or finished.
"""

import posixpath
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from raybert import storage
from raybert.errors import InputError
from raybert.probe.tasks import ProbeTask, parse_task

Record = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One checkpoint that waits to be probed."""

    run_uri: str
    step: int
    weights: str
    tasks: tuple[ProbeTask, ...]
    positions: int  # the longest sequence that the model takes
    cpus: float
    max_waiting: int
    submitted: float  # seconds since the epoch

    @property
    def uri(self) -> str:
        return queue_uri(self.run_uri, self.step)


def record_uri(run_uri: str, task: str, step: int) -> str:
    return storage.join(run_uri, "probes", f"{task}-{step:08d}.json")


def queue_uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, "probes", "queue", f"step-{step:08d}.json")


def weights_uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, "probes", "weights", f"step-{step:08d}")


def add(
    run_uri: str,
    step: int,
    tasks: Sequence[ProbeTask],
    write_weights: Callable[[str], object],
    *,
    positions: int,
    cpus: float,
    max_waiting: int,
) -> bool:
    """Queue a checkpoint, unless it is queued or each task has its record already (a resumed run passes steps again).

    Args:
        write_weights: writes a checkpoint of weights to the URI that it is given.

    Returns:
        Whether an entry was written.
    """
    missing = [task for task in tasks if not storage.exists(record_uri(run_uri, task.name, step))]
    if not missing or storage.exists(queue_uri(run_uri, step)):
        return False
    weights = weights_uri(run_uri, step)
    write_weights(weights)
    entry = {
        "step": step,
        "weights": weights,
        "tasks": [task.model_dump(mode="json") for task in missing],
        "positions": positions,
        "cpus": cpus,
        "max_waiting": max_waiting,
        "submitted": time.time(),
    }
    storage.write_json(queue_uri(run_uri, step), entry)
    return True


def waiting_steps(run_uri: str) -> list[int]:
    """The steps that are queued, in order."""
    names = (posixpath.basename(uri) for uri in storage.list_dir(storage.join(run_uri, "probes", "queue")))
    return sorted(int(name[5:-5]) for name in names if name.startswith("step-") and name.endswith(".json"))


def read_entry(run_uri: str, step: int) -> Entry:
    """
    Raises:
        InputError: the object is no queue entry.
    """
    uri = queue_uri(run_uri, step)
    try:
        found = storage.read_json(uri)
        return Entry(
            run_uri=run_uri,
            step=step,
            weights=str(found["weights"]),
            tasks=tuple(parse_task(task, uri) for task in found["tasks"]),
            positions=int(found["positions"]),
            cpus=float(found["cpus"]),
            max_waiting=int(found["max_waiting"]),
            submitted=float(found["submitted"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{uri} is no probe queue entry: {error}") from error


def open_tasks(entry: Entry) -> list[ProbeTask]:
    """Those of the entry's tasks that have no record yet."""
    return [task for task in entry.tasks if not storage.exists(record_uri(entry.run_uri, task.name, entry.step))]


def write_record(entry: Entry, task: str, status: str, values: Record) -> Record:
    """Write what came of a task: status "done" with the result, or "failed" or "skipped" with a "reason"."""
    record = {"step": entry.step, "task": task, "run": entry.run_uri, "status": status, **values}
    storage.write_json(record_uri(entry.run_uri, task, entry.step), record)
    return record


def finish(entry: Entry) -> None:
    """Remove the weights, then the entry. Every task has its record."""
    storage.remove(entry.weights)
    storage.remove(entry.uri)


def records(run_uri: str, seen: Iterable[str] = ()) -> dict[str, Record]:
    """The records of a run by their file names, in the order of task and step, without those in `seen`."""
    known = set(seen)
    found = {}
    for uri in storage.list_dir(storage.join(run_uri, "probes")):
        name = posixpath.basename(uri)
        if name not in known and name.endswith(".json") and name[-14:-13] == "-" and name[-13:-5].isdigit():
            found[name] = storage.read_json(uri)
    return found
