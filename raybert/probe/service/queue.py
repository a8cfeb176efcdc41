"""The probe queue of a run, as objects in storage: what waits, what came of it, and how each entry ends.

    RUN/probes/queue/step-00000200.json     waiting or running: the tasks and what they need
    RUN/probes/weights/step-00000200/       a copy of the weights that checkpoint retention never reaches
    RUN/probes/TASK-00000200.json           the record: a result, or why there is none
    RUN/probes/service.json                 which probe service serves this run (`raybert.probe.service.owner`)

An entry exists before its submission is acknowledged. It is removed last: after a record for each of its tasks is
written and the weights are gone. So whatever is killed in between, the entry is either found again or finished.
"""

import posixpath
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from raybert import storage
from raybert.errors import InputError
from raybert.probe.tasks import TASK_NAME, ProbeTask, parse_task

Record = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One checkpoint that waits to be probed."""

    run_uri: str
    step: int
    tasks: tuple[ProbeTask, ...]
    positions: int  # the longest sequence that the model takes
    cpus: float
    gpus: float
    max_waiting: int
    submitted: float  # seconds since the epoch

    @property
    def uri(self) -> str:
        return queue_uri(self.run_uri, self.step)

    @property
    def weights(self) -> str:
        """Not read from the object: what it names is deleted in the end."""
        return weights_uri(self.run_uri, self.step)


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
    gpus: float = 0.0,
) -> bool:
    """Queue a checkpoint for each task that has no record yet (a resumed run passes steps again).

    Where the step is queued already, perhaps for fewer tasks, its entry gets those that it lacks.

    Args:
        write_weights: writes a checkpoint of weights to the URI that it is given.

    Returns:
        Whether the step is queued now.
    """
    missing = [task for task in tasks if not storage.exists(record_uri(run_uri, task.name, step))]
    uri, submitted = queue_uri(run_uri, step), time.time()
    queued: tuple[ProbeTask, ...] = ()
    if storage.exists(uri):
        try:
            entry = read_entry(run_uri, step)
        except (InputError, FileNotFoundError):
            pass  # it ends just now, or nobody can make sense of it: a new one takes its place
        else:
            queued, submitted = entry.tasks, entry.submitted
            known = {task.name for task in queued}
            missing = [task for task in missing if task.name not in known]
            if not missing:
                return True
    if not missing:
        return False
    write_weights(weights_uri(run_uri, step))
    storage.write_json(
        uri,
        {
            "step": step,
            "tasks": [task.model_dump(mode="json") for task in (*queued, *missing)],
            "positions": positions,
            "cpus": cpus,
            "gpus": gpus,
            "max_waiting": max_waiting,
            "submitted": submitted,
        },
    )
    return True


def skip(run_uri: str, step: int, tasks: Sequence[ProbeTask], reason: str) -> None:
    """Record that a checkpoint which could not be queued has no result, for each task without a record."""
    if storage.exists(queue_uri(run_uri, step)):
        return
    for task in tasks:
        if not storage.exists(record_uri(run_uri, task.name, step)):
            _write(run_uri, step, task.name, "skipped", {"reason": reason})
    storage.remove(weights_uri(run_uri, step))


def waiting_steps(run_uri: str) -> list[int]:
    """The steps that are queued, in order."""
    names = (posixpath.basename(uri) for uri in storage.list_dir(storage.join(run_uri, "probes", "queue")))
    return sorted(int(name[5:-5]) for name in names if name.startswith("step-") and name.endswith(".json"))


def read_entry(run_uri: str, step: int) -> Entry:
    """
    Raises:
        FileNotFoundError: the step is not queued.
        InputError: the object is no queue entry.
    """
    uri = queue_uri(run_uri, step)
    try:
        found = storage.read_json(uri)
        return Entry(
            run_uri=run_uri,
            step=step,
            tasks=tuple(parse_task(task, uri) for task in found["tasks"]),
            positions=int(found["positions"]),
            cpus=float(found["cpus"]),
            gpus=float(found.get("gpus", 0.0)),
            max_waiting=int(found["max_waiting"]),
            submitted=float(found["submitted"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{uri} is no probe queue entry: {error}") from error


def refuse(run_uri: str, step: int, reason: str) -> list[Record]:
    """End an entry that cannot be read, and return its records: "failed" for each task that it names, else for
    "unreadable"."""
    names = _task_names(queue_uri(run_uri, step)) or ["unreadable"]
    open_names = [name for name in names if not storage.exists(record_uri(run_uri, name, step))]
    found = [_write(run_uri, step, name, "failed", {"reason": reason}) for name in open_names]
    _remove(run_uri, step)
    return found


def _task_names(uri: str) -> list[str]:
    """The names of an entry's tasks as far as they can be read; they become names of files."""
    try:
        names = [task["name"] for task in storage.read_json(uri)["tasks"]]
    except (ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and re.fullmatch(TASK_NAME, name)]


def open_tasks(entry: Entry) -> list[ProbeTask]:
    """Those of the entry's tasks that have no record yet."""
    return [task for task in entry.tasks if not storage.exists(record_uri(entry.run_uri, task.name, entry.step))]


def write_record(entry: Entry, task: str, status: str, values: Record) -> Record:
    """Write what came of a task: status "done" with the result, or "failed" or "skipped" with a "reason".

    Returns:
        The record that stands: the first one, whatever is written later.
    """
    uri = record_uri(entry.run_uri, task, entry.step)
    if storage.exists(uri):
        standing: Record = storage.read_json(uri)
        return standing
    return _write(entry.run_uri, entry.step, task, status, values)


def _write(run_uri: str, step: int, task: str, status: str, values: Record) -> Record:
    record = {"step": step, "task": task, "run": run_uri, "status": status, **values}
    storage.write_json(record_uri(run_uri, task, step), record)
    return record


def finish(entry: Entry) -> None:
    """Remove the weights, then the entry. Every task has its record."""
    _remove(entry.run_uri, entry.step)


def _remove(run_uri: str, step: int) -> None:
    storage.remove(weights_uri(run_uri, step))
    storage.remove(queue_uri(run_uri, step))


def records(run_uri: str, seen: Iterable[str] = ()) -> dict[str, Record]:
    """The records of a run by their file names, in the order of task and step, without those in `seen`."""
    known = set(seen)
    found = {}
    for uri in storage.list_dir(storage.join(run_uri, "probes")):
        name = posixpath.basename(uri)
        if name not in known and name.endswith(".json") and name[-14:-13] == "-" and name[-13:-5].isdigit():
            found[name] = storage.read_json(uri)
    return found
