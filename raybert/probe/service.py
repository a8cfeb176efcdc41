"""The probe service: one detached actor a cluster, which probes the checkpoints of all runs beside their training.

It holds nothing that storage does not hold: queues lie beside their runs (`raybert.probe.queue`), the list of runs in
the service's own directory. Killed at any moment, it reads both again and goes on. The work itself is done in Ray
tasks with resources of their own, so the actor always answers.
"""

import hashlib
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from raybert import storage
from raybert.errors import InputError
from raybert.probe import queue
from raybert.probe.baselines import Cache
from raybert.probe.embed import POOLINGS
from raybert.probe.encoders import open_encoder, tokenize
from raybert.probe.evaluate import Material, evaluate, prepare
from raybert.probe.queue import Entry, Record
from raybert.probe.tasks import ProbeTask
from raybert.telemetry import Board, tags_of

log = logging.getLogger(__name__)

# Probes that run at the same time, over all runs; of one run only one does.
PARALLEL = 16
# Seconds after which every queue is read again, whatever was announced. Announcements may be lost, entries cannot.
RESCAN = 60.0
# A run that nobody has mentioned for so long, and whose queue is empty, is forgotten until it is mentioned again.
FORGET = 3600.0
# A service of an older version that nobody uses any more ends itself.
IDLE_EXIT = 24 * 3600.0


def state_uri(root: str, name: str) -> str:
    """Where a service that was started with this storage root keeps what it must not forget."""
    return storage.join(storage.absolute(root), ".raybert", name)


@dataclass
class RunState:
    """What the service knows of one run."""

    uri: str
    mentioned: float  # time.monotonic()
    dirty: bool = True  # its queue is to be read
    entries: dict[int, Entry] = field(default_factory=dict)  # by step
    running: int | None = None  # step


@dataclass
class Running:
    """A probe under way."""

    entry: Entry
    task: ProbeTask
    started: float


class ProbeService:
    """The actor. Methods return at once; one thread does the work of `_turn` for as long as the process lives."""

    def __init__(self, name: str, root: str) -> None:
        self._name = name
        self._state = state_uri(root, name)
        self._cache = storage.join(self._state, "baselines")
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._runs: dict[str, RunState] = {}
        self._running: dict[ray.ObjectRef, Running] = {}
        self._materials: dict[str, ray.ObjectRef] = {}
        self._done = self._failed = self._skipped = 0
        self._started = time.time()
        self._last_scan = self._last_work = time.monotonic()
        run = ("run", "trial")
        self._board = Board(
            {
                "probe_accuracy": ("probe accuracy", (*run, "task", "pooling", "split")),
                "probe_queue": ("checkpoints that wait for their probe", run),
                "probe_seconds": ("seconds of the last probe", (*run, "task")),
            }
        )
        for uri in storage.list_dir(storage.join(self._state, "runs")):
            run_uri = storage.read_json(uri)["run"]
            self._runs[run_uri] = RunState(run_uri, time.monotonic())
        threading.Thread(target=self._work, name="probe-service", daemon=True).start()

    # -- what others call ---------------------------------------------------------------------------------------

    def submit(self, run_uri: str) -> None:
        """Serve this run: read its queue now. Known before this returns, also to a service that is killed after it."""
        with self._lock:
            known = run_uri in self._runs
        if not known:
            storage.write_json(self._run_file(run_uri), {"run": run_uri})
        storage.write_json(storage.join(run_uri, "probes", "service.json"), {"service": self._name})
        with self._lock:
            run = self._runs.setdefault(run_uri, RunState(run_uri, time.monotonic()))
            run.dirty, run.mentioned = True, time.monotonic()
        self._wake.set()

    def status(self) -> Record:
        """Process, counts, and for every run what waits and what runs."""
        with self._lock:
            running = list(self._running.values())
            now = time.time()
            return {
                "name": self._name,
                "pid": os.getpid(),
                "node": ray.util.get_node_ip_address(),
                "state": self._state,
                "seconds_up": now - self._started,
                "done": self._done,
                "failed": self._failed,
                "skipped": self._skipped,
                "runs": [
                    {
                        "run": run.uri,
                        "waiting": sorted(step for step in run.entries if step != run.running),
                        "running": [
                            {"step": r.entry.step, "task": r.task.name, "seconds": now - r.started}
                            for r in running
                            if r.entry.run_uri == run.uri
                        ],
                    }
                    for run in self._runs.values()
                ],
            }

    def ready(self) -> str:
        """Answers when the service has started."""
        return self._name

    # -- the work -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            try:
                self._turn()
            except Exception:  # storage or a node is away: everything is still in the queues
                log.exception("the probe service goes on after an error")
                self._wake.wait(5.0)
            if time.monotonic() - self._last_work > IDLE_EXIT:
                log.warning("nothing to probe for %.0f hours: the service ends", IDLE_EXIT / 3600)
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _turn(self) -> None:
        if time.monotonic() - self._last_scan > RESCAN:
            self._last_scan = time.monotonic()
            with self._lock:
                for run in self._runs.values():
                    run.dirty = True
        for run in self._snapshot():
            if run.dirty:
                run.dirty = False
                self._read_queue(run)
            self._keep_limit(run)
        self._launch()
        self._gather()

    def _snapshot(self) -> list[RunState]:
        with self._lock:
            return list(self._runs.values())

    def _read_queue(self, run: RunState) -> None:
        owner = storage.join(run.uri, "probes", "service.json")
        if storage.exists(owner) and storage.read_json(owner)["service"] != self._name:
            self._forget(run)  # a service of another version has taken the run over
            return
        for step in queue.waiting_steps(run.uri):
            if step in run.entries:
                continue
            try:
                entry = queue.read_entry(run.uri, step)
            except FileNotFoundError:
                continue
            except InputError as error:
                log.warning("%s", error)
                continue
            with self._lock:
                run.entries[step] = entry
            if not queue.open_tasks(entry):
                self._finish(run, entry)
        self._board.set("probe_queue", len(run.entries), tags_of(run.uri))
        if not run.entries and time.monotonic() - run.mentioned > FORGET:
            self._forget(run)

    def _forget(self, run: RunState) -> None:
        with self._lock:
            self._runs.pop(run.uri, None)
        self._board.forget(tags_of(run.uri))
        storage.remove(self._run_file(run.uri))

    def _keep_limit(self, run: RunState) -> None:
        """Past the limit of the newest entry, the oldest that wait are recorded as skipped."""
        waiting = sorted(step for step in run.entries if step != run.running)
        if not waiting:
            return
        limit = run.entries[waiting[-1]].max_waiting
        for step in waiting[: max(0, len(waiting) - limit)]:
            entry = run.entries[step]
            reason = f"more than probe.max_waiting={limit} checkpoints of this run waited, and this was the oldest"
            for task in queue.open_tasks(entry):
                queue.write_record(entry, task.name, "skipped", {"reason": reason})
                self._skipped += 1
            self._finish(run, entry)

    def _launch(self) -> None:
        """Start the oldest entry of every run that has none under way, those first that have waited longest."""
        idle = [run for run in self._snapshot() if run.running is None and run.entries]
        for run in sorted(idle, key=lambda run: run.entries[min(run.entries)].submitted):
            if len(self._running) >= PARALLEL:
                return
            entry = run.entries[min(run.entries)]
            tasks = queue.open_tasks(entry)
            if not tasks:
                self._finish(run, entry)
                continue
            task, options = tasks[0], _task_options(entry.cpus)
            material = self._material(task, entry, options)
            ref = _probe.options(**options).remote(material, entry.weights, self._cache)
            with self._lock:
                run.running = entry.step
                self._running[ref] = Running(entry, task, time.time())
            self._last_work = time.monotonic()

    def _material(self, task: ProbeTask, entry: Entry, options: dict[str, Any]) -> ray.ObjectRef:
        """The task's texts, read and tokenised once and kept in the object store for all probes."""
        key = self._material_key(task, entry)
        if key not in self._materials:
            self._materials[key] = _prepare.options(**options).remote(task, entry.positions)
        return self._materials[key]

    @staticmethod
    def _material_key(task: ProbeTask, entry: Entry) -> str:
        """Models with fewer positions need shorter sequences."""
        return f"{task.hash}:{min(task.max_tokens, entry.positions)}"

    def _gather(self) -> None:
        """Wait a moment for a probe to end, or for news."""
        if not self._running:
            self._wake.wait(1.0)
            self._wake.clear()
            return
        done, _ = ray.wait(list(self._running), timeout=0.5)
        for ref in done:
            with self._lock:
                running = self._running.pop(ref)
            self._record(ref, running)

    def _record(self, ref: ray.ObjectRef, running: Running) -> None:
        entry, task = running.entry, running.task
        with self._lock:
            run = self._runs.get(entry.run_uri)
            if run is not None:
                run.running = None
        self._last_work = time.monotonic()
        try:
            values = ray.get(ref)
        except Exception as error:  # whatever the task raised, or its node's end: it is a record, too
            self._materials.pop(self._material_key(task, entry), None)
            queue.write_record(entry, task.name, "failed", {"reason": _reason(error)})
            self._failed += 1
        else:
            waited = running.started - entry.submitted
            record = queue.write_record(entry, task.name, "done", {**values, "seconds_waited": max(0.0, waited)})
            self._done += 1
            self._show(record)
        if run is not None and not queue.open_tasks(entry):
            self._finish(run, entry)

    def _finish(self, run: RunState, entry: Entry) -> None:
        queue.finish(entry)
        with self._lock:
            run.entries.pop(entry.step, None)
        self._board.set("probe_queue", len(run.entries), tags_of(run.uri))

    def _show(self, record: Record) -> None:
        tags = {**tags_of(record["run"]), "task": record["task"]}
        self._board.set("probe_seconds", record["seconds"], tags)
        for pooling in POOLINGS:
            for split in ("train", "test"):
                value = record[pooling][f"{split}_accuracy"]
                self._board.set("probe_accuracy", value, {**tags, "pooling": pooling, "split": split})

    def _run_file(self, run_uri: str) -> str:
        name = hashlib.sha256(run_uri.encode()).hexdigest()[:32]
        return storage.join(self._state, "runs", f"{name}.json")


def _task_options(cpus: float) -> dict[str, Any]:
    """Processes of their own (the environment differs from other tasks'), with as many threads as CPUs."""
    threads = str(max(1, int(cpus)))
    return {"num_cpus": cpus, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "RAYBERT_PROBE": threads}}}


def _be_modest() -> None:
    """Where processes share cores, training comes first; and no library may start a thread for every core."""
    if os.getpriority(os.PRIO_PROCESS, 0) < 10:
        os.setpriority(os.PRIO_PROCESS, 0, 10)
    torch.set_num_threads(int(os.environ["RAYBERT_PROBE"]))


@ray.remote(max_retries=3)
def _prepare(task: ProbeTask, positions: int) -> Material:
    _be_modest()
    return prepare(task, tokenize, positions)


@ray.remote(max_retries=3)
def _probe(material: Material, weights: str, cache: str) -> Record:
    _be_modest()
    return evaluate(open_encoder(weights), material, Cache(cache))


def _reason(error: BaseException) -> str:
    """What went wrong in one line, without the remote stack."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"
