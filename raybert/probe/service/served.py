"""One run in the hands of the probe service: its queue, what is to be probed next, and how each entry ends."""

import time
from dataclasses import dataclass, field

from raybert.errors import InputError
from raybert.probe import kinds
from raybert.probe.kind import ProbeTask
from raybert.probe.service import best, owner, queue, work
from raybert.probe.service.owner import Owner
from raybert.probe.service.queue import Entry, Record

# Seconds between two signs of life in storage, for whoever waits elsewhere.
RENEW = 60.0


@dataclass
class Probe:
    """A probe that is to be done or under way."""

    entry: Entry
    task: ProbeTask
    key: str  # of the task's texts
    # Other tasks of the entry that share texts with it, which the same pass of the encoder serves, with their keys.
    beside: tuple[tuple[ProbeTask, str], ...] = ()
    started: float | None = None  # seconds since the epoch; None until it has got its CPUs


@dataclass(frozen=True)
class Outcome:
    """How a probe ended: with values or with an error."""

    probe: Probe
    values: Record = field(default_factory=dict)
    error: BaseException | None = None


class ServedRun:
    """What the service knows of one run.

    `advance` is the only method that touches storage, and it runs once at a time (`busy`). What it raises leaves the
    run as it was, so that the next call takes up where this one stopped: a result that could not be written stays in
    `outcome` and is not measured again.

    Attributes:
        mentioned: when somebody last asked for the run to be served (time.monotonic).
        dirty: the queue is to be read.
        not_before: earliest next attempt at anything (time.monotonic), after failures.
        texts: by task, the key of the texts that its last probe used.
        news: the records that were written since somebody took them.
        gone: another service owns the run.
        trouble: why its storage could not be read or written the last time.
    """

    def __init__(self, uri: str, me: Owner) -> None:
        self.uri, self._me = uri, me
        self.mentioned = time.monotonic()
        self.dirty, self.busy, self.gone = True, False, False
        self.entries: dict[int, Entry] = {}
        self.next: Probe | None = None
        self.running: Probe | None = None
        self.outcome: Outcome | None = None
        self.texts: dict[str, str] = {}
        self.news: list[Record] = []
        self.not_before, self.errors, self.trouble = 0.0, 0, ""
        self._failures: dict[tuple[int, str], int] = {}
        self._judged: Entry | None = None  # has a new record, which may say that its weights are the best
        self._apart: set[int] = set()  # steps whose tasks are probed one by one, since together they failed
        self._renewed = 0.0

    @property
    def waiting(self) -> list[int]:
        """The steps that wait, in order."""
        under_way = {probe.entry.step for probe in (self.running, self.outcome and self.outcome.probe) if probe}
        return sorted(step for step in list(self.entries) if step not in under_way)

    @property
    def due(self) -> bool:
        """There is something to do in storage."""
        idle = self.running is None and self.next is None and bool(self.entries)
        return (
            not self.busy and time.monotonic() >= self.not_before and (self.dirty or idle or self.outcome is not None)
        )

    def advance(self) -> None:
        """Write what came of the last probe, read the queue if it may have changed, and say what comes next."""
        found = owner.owner_of(self.uri)
        self.gone = found is not None and found != self._me
        if self.gone:
            return
        if self.outcome is not None:
            if self._record_outcome(self.outcome):
                self._judged = self.outcome.probe.entry
            self.outcome = None
        if self._judged is not None:  # now: the entry's next task may take long
            best.keep(self._judged)
            self._judged = None
        if self.dirty:
            self.dirty = False
            try:
                self._read_queue()
            except BaseException:
                self.dirty = True
                raise
        if self.entries and (found is None or time.monotonic() - self._renewed > RENEW):
            owner.claim(self.uri, self._me)
            self._renewed = time.monotonic()
        self._keep_limit()
        if self.running is None:
            self.next = self._choose()

    def _read_queue(self) -> None:
        """Entries that are known are read as well: a resumed run may have given them another task."""
        steps = queue.waiting_steps(self.uri)
        for step in steps:
            try:
                self.entries[step] = queue.read_entry(self.uri, step)
            except FileNotFoundError:
                continue
            except InputError as error:
                self.news += queue.refuse(self.uri, step, str(error))
        for step in self.entries.keys() - set(steps) - {self.running.entry.step if self.running else None}:
            del self.entries[step]

    def _keep_limit(self) -> None:
        """Past the limit of the newest entry, the oldest that wait are recorded as skipped.

        Never the run's start, which all later ones are compared with.
        """
        waiting = [step for step in self.waiting if step > 0]
        limit = self.entries[waiting[-1]].max_waiting if waiting else 0
        for step in waiting[: max(0, len(waiting) - limit)]:
            entry = self.entries[step]
            reason = (
                f"more than probe.max_waiting={limit} checkpoints of this run were waiting, and this was the oldest"
            )
            for task in queue.open_tasks(entry):
                self.news.append(queue.write_record(entry, task.name, "skipped", {"reason": reason}))
            self._finish(entry)

    def _choose(self) -> Probe | None:
        """The first task without a record of the oldest entry; a costly one when nothing else waits."""
        costly: Probe | None = None
        for step in sorted(self.entries):
            entry = self.entries[step]
            tasks = queue.open_tasks(entry)
            if not tasks:
                self._finish(entry)
                continue
            first, *others = kinds.passes(tasks)[0]
            if kinds.of_task(first).costly:
                costly = costly or Probe(entry, first, self._key(first, entry))
                continue
            beside = tuple((task, self._key(task, entry)) for task in others if step not in self._apart)
            return Probe(entry, first, self._key(first, entry), beside)
        return costly

    def _key(self, task: ProbeTask, entry: Entry) -> str:
        key = self.texts[task.name] = work.texts_key(task, entry)
        return key

    def _record_outcome(self, outcome: Outcome) -> bool:
        """Write its records; False while it is to be tried again."""
        entry, task, error = outcome.probe.entry, outcome.probe.task, outcome.error
        if error is None:
            values = dict(outcome.values)
            waited = {"seconds_waited": max(0.0, values.pop("started") - entry.submitted)}
            for name, of_other in values.pop("beside", {}).items():
                self.news.append(queue.write_record(entry, name, "done", {**of_other, **waited}))
            record = queue.write_record(entry, task.name, "done", {**values, **waited})
        elif outcome.probe.beside:  # whose fault it was will be seen when each has a pass of its own
            self._apart.add(entry.step)
            self.not_before = time.monotonic() + work.pause_after(1)
            return False
        else:
            place = (entry.step, task.name)
            failures = self._failures[place] = self._failures.get(place, 0) + 1
            if work.try_again(error, failures):
                self.not_before = time.monotonic() + work.pause_after(failures)
                return False
            record = queue.write_record(entry, task.name, "failed", {"reason": work.reason(error, failures)})
        self._failures.pop((entry.step, task.name), None)
        self.news.append(record)
        return True

    def _finish(self, entry: Entry) -> None:
        """Remove an entry whose tasks all have their records, unless it has been given another task meanwhile."""
        try:
            now = queue.read_entry(self.uri, entry.step)
        except (FileNotFoundError, InputError):
            now = entry
        if queue.open_tasks(now):
            self.entries[entry.step], self.dirty = now, True
            return
        best.keep(entry)  # again, for a service that ended between the record and the copy
        queue.finish(entry)
        self._apart.discard(entry.step)
        self.entries.pop(entry.step, None)
