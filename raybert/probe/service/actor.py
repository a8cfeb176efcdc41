"""The probe service: one detached actor a cluster, which probes the checkpoints of all runs beside their training.

It holds nothing that storage does not hold: queues lie beside their runs (`raybert.probe.service.queue`), the list of
runs in the service's own directory. Killed at any moment, it reads both again and resumes. The probes run in Ray tasks
with resources of their own, so the actor always answers; and each run's storage is read and written in a thread of a
pool, so that trouble with one run's storage does not delay the others.
"""

import hashlib
import logging
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import ray

from raybert import storage
from raybert.probe import kinds
from raybert.probe.service import owner, work
from raybert.probe.service.owner import Owner
from raybert.probe.service.queue import Record
from raybert.probe.service.served import Outcome, Probe, ServedRun
from raybert.records import is_number, read_object
from raybert.telemetry import Board, tags_of

log = logging.getLogger(__name__)

# Probes that run at the same time, over all runs; of one run only one does.
PARALLEL = 16
# Runs whose storage is looked into at the same time.
LOOKERS = 16
# Seconds after which every queue is read again, whatever was announced. Announcements may be lost, entries cannot.
RESCAN = 60.0
# A run that nobody has mentioned for so long, and whose queue is empty, is forgotten until it is mentioned again.
FORGET = 3600.0
# A service of an older version that nobody uses any more ends itself.
IDLE_EXIT = 24 * 3600.0
# Seconds of pause after storage failed, doubled up to the second number.
STORAGE_PAUSE = (1.0, 60.0)


def state_uri(root: str, name: str) -> str:
    """Where a service that was started with this storage root keeps what it must not forget."""
    return storage.join(storage.absolute(root), ".raybert", name)


class ProbeService:
    """The actor. Methods return at once; one thread does the work of `_run_once` for as long as the process lives."""

    def __init__(self, name: str, root: str) -> None:
        self._me = Owner(name, owner.cluster_id())
        self._state = state_uri(root, name)
        self._cache = storage.join(self._state, "baselines")
        self._lock = threading.Lock()  # of what is in memory
        self._registry = threading.Lock()  # of a run's entry in memory and in the list in storage, together
        self._wake = threading.Event()
        self._pool = ThreadPoolExecutor(LOOKERS, thread_name_prefix="probe-storage")
        self._runs: dict[str, ServedRun] = {}
        self._running: dict[ray.ObjectRef, tuple[ServedRun, Probe]] = {}
        self._trained: dict[ray.ObjectRef, list[ray.ObjectRef]] = {}  # what those wait for
        self._texts: dict[str, ray.ObjectRef] = {}
        self._counts: Counter[str] = Counter()
        self._stopped = False
        self._started = time.time()
        self._last_scan = self._last_work = time.monotonic()
        run = ("run", "trial")
        of_pooling = (*run, "task", "kind", "pooling")
        self._board = Board(
            {
                "probe_accuracy": ("probe accuracy", (*run, "task", "pooling", "split")),
                "probe_headline": ("headline of the task", of_pooling),
                "probe_figure": ("other figures of the task", (*of_pooling, "figure")),
                "probe_baseline": ("baselines of the headline", (*of_pooling, "baseline")),
                "probe_queue": ("checkpoints waiting for a probe", run),
                "probe_seconds": ("seconds of the last probe", (*run, "task")),
            }
        )
        for uri in storage.list_dir(storage.join(self._state, "runs", self._me.cluster)):
            try:
                run_uri = str(read_object(uri)["run"])
            except (FileNotFoundError, ValueError, KeyError) as error:  # whoever waits for the run announces it again
                log.warning("Skipping %s, which names no run: %s", uri, error)
                continue
            self._runs[run_uri] = ServedRun(run_uri, self._me)
        threading.Thread(target=self._work, name="probe-service", daemon=True).start()

    # -- what others call ---------------------------------------------------------------------------------------

    def submit(self, run_uri: str) -> None:
        """Serve this run: read its queue now. It is recorded before this returns, so a restarted service knows it."""
        owner.claim(run_uri, self._me)
        with self._registry:
            if run_uri not in self._runs:
                storage.write_json(self._run_file(run_uri), {"run": run_uri})
            with self._lock:
                run = self._runs.setdefault(run_uri, ServedRun(run_uri, self._me))
                run.dirty, run.mentioned = True, time.monotonic()
        self._wake.set()

    def started(self, run_uri: str, step: int, task: str, when: float) -> None:
        """A probe has got its CPUs and begins."""
        with self._lock:
            for run, probe in self._running.values():
                if (run.uri, probe.entry.step, probe.task.name) == (run_uri, step, task):
                    probe.started = probe.started or when

    def release(self) -> None:
        """Begin nothing more, and leave the runs to the next service that is asked to serve them."""
        self._stopped = True
        for run in self._snapshot():
            owner.release(run.uri, self._me)

    def status(self) -> Record:
        """Process, counts, and for every run what waits and what runs."""
        with self._lock:
            running, runs = list(self._running.values()), list(self._runs.values())
        free = ray.available_resources() if any(probe.started is None for _, probe in running) else {}
        now = time.time()
        return {
            "name": self._me.service,
            "cluster": self._me.cluster,
            "pid": os.getpid(),
            "node": ray.util.get_node_ip_address(),
            "state": self._state,
            "seconds_up": now - self._started,
            "done": self._counts["done"],
            "failed": self._counts["failed"],
            "skipped": self._counts["skipped"],
            "runs": [
                {
                    "run": run.uri,
                    "waiting": run.waiting,
                    "running": [_show_probe(probe, now, free) for other, probe in running if other is run],
                    "trouble": run.trouble,
                }
                for run in runs
            ],
        }

    # -- the work -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopped:
            try:
                self._run_once()
            except Exception:  # a node is away: everything is still in the queues
                log.exception("The probe service continues after an error")
                self._wake.wait(5.0)
            if time.monotonic() - self._last_work > IDLE_EXIT:
                log.warning("Nothing to probe for %.0f hours; the probe service exits", IDLE_EXIT / 3600)
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _run_once(self) -> None:
        runs = self._snapshot()
        if time.monotonic() - self._last_scan > RESCAN:
            self._last_scan = time.monotonic()
            for run in runs:
                run.dirty = True
        for run in runs:
            if run.due:
                run.busy = True
                self._pool.submit(self._advance, run)
        self._launch(runs)
        used = {key for run in runs for key in list(run.texts.values())}
        self._texts = {key: ref for key, ref in self._texts.items() if key in used}
        if self._running or any(run.entries for run in runs):
            self._last_work = time.monotonic()
        self._gather()

    def _snapshot(self) -> list[ServedRun]:
        with self._lock:
            return list(self._runs.values())

    def _advance(self, run: ServedRun) -> None:
        """In a thread of the pool: all that is to be done in a run's storage now."""
        mentioned = run.mentioned
        try:
            run.advance()
            run.errors, run.trouble = 0, ""
        except Exception as error:
            run.errors, run.trouble = run.errors + 1, f"{type(error).__name__}: {error}"
            first, most = STORAGE_PAUSE
            run.not_before = time.monotonic() + min(most, first * 2.0 ** min(run.errors, 16))
            log.warning("The storage of %s fails (%s); retrying", run.uri, run.trouble)
        try:
            self._publish(run)
            if run.gone or (not run.entries and time.monotonic() - mentioned > FORGET):
                self._forget(run, mentioned)
        except Exception:
            log.exception("Cannot update the run %s; keeping it", run.uri)
        finally:
            run.busy = False
            self._wake.set()

    def _publish(self, run: ServedRun) -> None:
        news, run.news = run.news, []
        for record in news:
            self._counts[record["status"]] += 1
            if record["status"] == "done":
                self._show(record)
        self._board.set("probe_queue", len(run.waiting), tags_of(run.uri))

    def _forget(self, run: ServedRun, mentioned: float) -> None:
        """Unless somebody has asked for the run since it was looked at."""
        with self._registry:
            if run.mentioned != mentioned:
                run.gone = False
                return
            storage.remove(self._run_file(run.uri))
            with self._lock:
                del self._runs[run.uri]
        self._board.forget(tags_of(run.uri))

    def _launch(self, runs: list[ServedRun]) -> None:
        """Start what comes next in every run that has no probe under way, those first that have waited longest."""
        now = time.monotonic()
        free = [run for run in runs if not run.busy and run.outcome is None and now >= run.not_before]
        ready = [(run, run.next) for run in free if run.next]
        for run, probe in sorted(ready, key=lambda pair: pair[1].entry.submitted):
            if len(self._running) >= PARALLEL:
                return
            # Read and tokenised once, and kept in the object store for all probes of these texts.
            wanted = [(probe.task, probe.key), *probe.beside]
            for task, key in wanted:
                if key not in self._texts:
                    self._texts[key] = work.read_texts(task, probe.entry)
            me = ray.get_runtime_context().current_actor
            texts = [self._texts[key] for _, key in wanted]
            ref, trained = work.probe(probe.entry, probe.task, texts, self._cache, me)
            self._trained[ref] = trained
            with self._lock:
                run.next, run.running = None, probe
                self._running[ref] = (run, probe)
            self._board.set("probe_queue", len(run.waiting), tags_of(run.uri))

    def _gather(self) -> None:
        """Wait a moment for a probe to end, or for news."""
        if not self._running:
            self._wake.wait(1.0)
            self._wake.clear()
            return
        done, _ = ray.wait(list(self._running), timeout=0.5)
        for ref in done:
            with self._lock:
                run, probe = self._running.pop(ref)
            trained = self._trained.pop(ref)
            try:
                outcome = Outcome(probe, values=ray.get(ref))
            except Exception as error:  # whatever the task raised, or its node's end
                for key in (probe.key, *(key for _, key in probe.beside)):
                    self._texts.pop(key, None)
                for other in trained:  # the others would go on, and write where the weights may soon be gone
                    with suppress(Exception):
                        ray.cancel(other, force=True)
                outcome = Outcome(probe, error=error)
            run.outcome, run.running = outcome, None

    def _show(self, record: Record) -> None:
        tags = {**tags_of(record["run"]), "task": record["task"]}
        self._board.set("probe_seconds", record["seconds"], tags)
        kind = kinds.of_record(record)
        assert kind is not None  # this service wrote it
        for pooling in kinds.poolings(record):
            entry, of_pooling = record[pooling], {**tags, "pooling": pooling, "kind": kind.name}
            self._board.set("probe_headline", float(entry[kind.headline.key]), of_pooling)
            for name in (*kind.headline.others, "tuned_accuracy"):
                if is_number(entry.get(name)):
                    self._board.set("probe_figure", float(entry[name]), {**of_pooling, "figure": name})
            for split in ("train", "test"):
                if (value := entry.get(f"{split}_accuracy")) is not None:
                    self._board.set("probe_accuracy", value, {**tags, "pooling": pooling, "split": split})
        for name, pooling, value in kinds.baselines(record):
            of_baseline = {**tags, "pooling": pooling, "kind": kind.name, "baseline": name}
            self._board.set("probe_baseline", value, of_baseline)

    def _run_file(self, run_uri: str) -> str:
        name = hashlib.sha256(run_uri.encode()).hexdigest()[:32]
        return storage.join(self._state, "runs", self._me.cluster, f"{name}.json")


def _show_probe(probe: Probe, now: float, free: dict[str, float]) -> Record:
    """A probe for `status`: how long it has run, or what it waits for."""
    needs = {"CPU": probe.entry.cpus, "GPU": probe.entry.gpus}
    short = {name: need for name, need in needs.items() if need > free.get(name, 0.0) + 1e-6}
    waits = [f"{need:g} {name}s (the cluster has {free.get(name, 0.0):g} free)" for name, need in short.items()]
    return {
        "step": probe.entry.step,
        "task": probe.task.name,
        "seconds": None if probe.started is None else now - probe.started,
        "waits_for": " and ".join(waits) if probe.started is None else "",
    }
