"""The probe queue of a run, as objects in storage: what waits, what came of it, and how each entry ends.

    RUN/probes/queue/step-00000200.json     waiting or running: the tasks and what they need
    RUN/probes/weights/step-00000200/       a copy of the weights that checkpoint retention never reaches
        trained/                            what trainings of a costly probe have found so far
    RUN/probes/TASK-00000200.json           the record: a result, or why there is none
    RUN/probes/baselines/                   of trainings that their budget cut short, so that none is done again
    RUN/probes/best.json                    whose weights the run keeps as its best (`raybert.probe.service.best`)
    RUN/probes/service.json                 which probe service serves this run (`raybert.probe.service.owner`)

An entry exists before its submission is acknowledged. It is removed last: after a record for each of its tasks is
written and the weights are gone. So whatever is killed in between, the entry is either found again or finished.
A record that is damaged (a machine lost its power) counts as none: the probe is done anew if the step is still queued,
or when a resumed run passes it again.
"""

import posixpath
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raybert import storage
from raybert.errors import InputError
from raybert.probe import record as probe_record
from raybert.probe.kind import TASK_NAME, ProbeTask
from raybert.probe.record import Record
from raybert.probe.tasks import parse_task
from raybert.records import is_count, is_number, read_object

_QUEUED = re.compile(r"step-(\d{8,15})\.json")
LARGEST_SHARE = 1e6  # CPUs of a probe


@dataclass(frozen=True)
class Request:
    """A checkpoint that is to be probed by some tasks, and what each probe of it needs."""

    run_uri: str
    step: int
    tasks: tuple[ProbeTask, ...]
    positions: int  # the longest sequence that the model takes
    cpus: float
    max_waiting: int  # checkpoints of the run; past that the oldest are skipped
    gpus: float = 0.0
    workers: int = (
        1  # processes at a time, each with these CPUs and GPUs: for trainings that need nothing of each other
    )
    tokenizer: str = ""  # hash of the run's, which lies beside the weights; empty where it is raybert's own
    begins_random: bool = False  # the run's start is an untrained encoder and has no record at step 0
    best: str = ""  # the metric whose best weights the run keeps, where a probe measures it (`raybert.probe.metrics`)

    @property
    def weights(self) -> str:
        """Where the weights lie. Not read from the queue's object: what it names is deleted in the end."""
        return weights_uri(self.run_uri, self.step)


@dataclass(frozen=True, kw_only=True)
class Entry(Request):
    """A request that waits."""

    submitted: float  # seconds since the epoch


def record_uri(run_uri: str, task: str, step: int) -> str:
    return storage.join(run_uri, "probes", f"{task}-{step:08d}.json")


def queue_uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, "probes", "queue", f"step-{step:08d}.json")


def weights_uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, "probes", "weights", f"step-{step:08d}")


def new_tasks(request: Request) -> tuple[ProbeTask, ...]:
    """Those of the request's tasks that have no record yet and are not queued. A resumed run passes steps again."""
    return _new_tasks(request, _queued_entry(request))


def add(request: Request) -> bool:
    """Queue the request for its new tasks, whose weights must lie at `request.weights` already.

    Where the step is queued already, perhaps for fewer tasks, its entry gets those that it lacks.

    Returns:
        Whether the step is queued now.
    """
    standing = _queued_entry(request)
    new = _new_tasks(request, standing)
    if not new:
        return standing is not None
    queued, submitted = (standing.tasks, standing.submitted) if standing else ((), time.time())
    storage.write_json(
        queue_uri(request.run_uri, request.step),
        {
            "step": request.step,
            "tasks": [task.model_dump(mode="json") for task in (*queued, *new)],
            "positions": request.positions,
            "cpus": request.cpus,
            "gpus": request.gpus,
            "workers": request.workers,
            "tokenizer": request.tokenizer,
            "begins_random": request.begins_random,
            "best": request.best,
            "max_waiting": request.max_waiting,
            "submitted": submitted,
        },
    )
    return True


def _new_tasks(request: Request, standing: Entry | None) -> tuple[ProbeTask, ...]:
    queued = {task.name for task in standing.tasks} if standing else set()
    return tuple(task for task in open_tasks(request) if task.name not in queued)


def _queued_entry(request: Request) -> Entry | None:
    """The entry of the request's step; None where there is none, or one that a new one replaces."""
    if not storage.exists(queue_uri(request.run_uri, request.step)):
        return None
    try:
        return read_entry(request.run_uri, request.step)
    except (InputError, FileNotFoundError):
        return None  # it ends just now, or cannot be read


def skip(run_uri: str, step: int, tasks: Sequence[ProbeTask], reason: str) -> None:
    """Record that a checkpoint which could not be queued has no result, for each task without a record."""
    if storage.exists(queue_uri(run_uri, step)):
        return
    for task in tasks:
        if read_record(run_uri, task.name, step) is None:
            _write(run_uri, step, task.name, "skipped", {"reason": reason})
    storage.remove(weights_uri(run_uri, step))


def waiting_steps(run_uri: str) -> list[int]:
    """The steps that are queued, in order."""
    names = (posixpath.basename(uri) for uri in storage.list_dir(storage.join(run_uri, "probes", "queue")))
    return sorted(int(match[1]) for match in map(_QUEUED.fullmatch, names) if match)


def read_entry(run_uri: str, step: int) -> Entry:
    """
    Raises:
        FileNotFoundError: the step is not queued.
        InputError: the object is not a queue entry.
    """
    uri = queue_uri(run_uri, step)
    try:
        found = read_object(uri)
        entry = Entry(
            run_uri=run_uri,
            step=step,
            tasks=tuple(parse_task(task, uri) for task in found["tasks"]),
            positions=found["positions"],
            cpus=found["cpus"],
            gpus=found.get("gpus", 0.0),
            workers=found.get("workers", 1),
            tokenizer=str(found.get("tokenizer", "")),
            begins_random=bool(found.get("begins_random", False)),
            best=str(found.get("best", "")),
            max_waiting=found["max_waiting"],
            submitted=found["submitted"],
        )
        # What Ray would refuse, in the middle of the service's work for all runs.
        counts = all(map(is_count, (entry.positions, entry.max_waiting, entry.workers))) and is_number(entry.submitted)
        if not counts or not entry.workers or not _fits(entry.cpus, LARGEST_SHARE) or not _fits(entry.gpus, 1.0):
            raise ValueError("a number is missing or out of range")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{uri} is not a probe queue entry: {error}") from error
    return entry


def _fits(share: Any, largest: float) -> bool:
    return is_number(share) and 0 <= share <= largest


def refuse(run_uri: str, step: int, reason: str) -> list[Record]:
    """End an entry that cannot be read, and return its records: "failed" for each task that it names, else for
    "unreadable"."""
    names = _task_names(queue_uri(run_uri, step)) or ["unreadable"]
    open_names = [name for name in names if read_record(run_uri, name, step) is None]
    found = [_write(run_uri, step, name, "failed", {"reason": reason}) for name in open_names]
    _remove(run_uri, step)
    return found


def _task_names(uri: str) -> list[str]:
    """The names of an entry's tasks as far as they can be read; they become names of files."""
    try:
        names = [task["name"] for task in read_object(uri)["tasks"]]
    except (ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and re.fullmatch(TASK_NAME, name)]


def open_tasks(request: Request) -> list[ProbeTask]:
    """Those of the request's tasks that have no record yet."""
    return [task for task in request.tasks if read_record(request.run_uri, task.name, request.step) is None]


def write_record(entry: Entry, task: str, status: str, values: Record) -> Record:
    """Write the outcome of a task: status "done" with the result, or "failed" or "skipped" with a "reason".

    Returns:
        The record that stands: the first one, whatever is written later.
    """
    standing = read_record(entry.run_uri, task, entry.step)
    return standing or _write(entry.run_uri, entry.step, task, status, values)


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


def read_record(run_uri: str, task: str, step: int) -> Record | None:
    """The record of a task at a step; None where there is none, or a damaged one."""
    uri = record_uri(run_uri, task, step)
    with suppress(FileNotFoundError, ValueError):
        return probe_record.parse(storage.read_bytes(uri), posixpath.basename(uri))
    return None


@dataclass(frozen=True)
class Records:
    """What RUN/probes holds, by file names in the order of task and step."""

    good: dict[str, Record]
    damaged: dict[str, str]  # and what is wrong with them


def read_records(run_uri: str, seen: Iterable[str] = ()) -> Records:
    """The records of a run, without those in `seen`."""
    known, good, damaged = set(seen), {}, {}
    for uri in storage.list_dir(storage.join(run_uri, "probes")):
        name = posixpath.basename(uri)
        if name not in known and probe_record.NAME.fullmatch(name):
            try:
                good[name] = probe_record.parse(storage.read_bytes(uri), name)
            except FileNotFoundError:
                continue
            except ValueError as error:
                damaged[name] = str(error)
    return Records(good, damaged)


def records(run_uri: str, seen: Iterable[str] = ()) -> dict[str, Record]:
    """Those that can be read; see `read_records`."""
    return read_records(run_uri, seen).good
