"""Following a run from its directory: one thread reads what is new there, and tells everybody who wants to know.

What is shown is what was recorded, wherever the workers are.
"""

import logging
import queue as queues
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from raybert import storage
from raybert.probe.service import queue
from raybert.records import METRICS, parse_lines
from raybert.train.recovery import faults

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Kind = Literal["record", "fault", "probe"]
News = tuple[Kind, Record]

LOCAL_SECONDS, REMOTE_SECONDS = 0.5, 10.0  # between two looks into the directory


def _ignore(*_: Record) -> None:
    pass


@dataclass(frozen=True)
class Subscriber:
    """Receives a run's news; all callbacks come from one thread, one after the other."""

    name: str
    on_record: Callable[[Record], object] = _ignore  # a new line of metrics.jsonl
    on_fault: Callable[[Record], object] = _ignore  # what went wrong
    on_probe: Callable[[Record], object] = _ignore  # a new probe record
    on_look: Callable[[], object] = _ignore  # after each look, whether there was news or not
    history: bool = False  # begin with what lies there already

    def tell(self, kind: Kind, value: Record) -> None:
        callbacks: dict[Kind, Callable[[Record], object]] = {
            "record": self.on_record,
            "fault": self.on_fault,
            "probe": self.on_probe,
        }
        callbacks[kind](value)


class RunReader:
    """Reads what is new in a run's directory since the last time. What cannot be read is skipped, and counted.

    Attributes:
        damaged_lines: of metrics.jsonl.
        damaged_faults: what is wrong with a file of a fault, by its name.
    """

    def __init__(self, run_uri: str) -> None:
        self._run_uri, self._metrics = run_uri, storage.join(run_uri, METRICS)
        self.damaged_lines = 0
        self.damaged_faults: dict[str, str] = {}
        self._offset = 0
        self._seen_faults: set[str] = set()
        self._seen_probes: set[str] = set()

    def read(self) -> Iterator[News]:
        """After an exception, the next call continues where this one stopped."""
        for record in self._new_records():
            yield "record", record
        found, damaged = faults.read_faults(self._run_uri, self._seen_faults)
        self.damaged_faults |= damaged
        for fault in found:
            yield "fault", fault
        for result in self._new_probes():
            yield "probe", result

    def _new_records(self) -> list[Record]:
        content = storage.read_from(self._metrics, self._offset)
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        lines = parse_lines(complete)
        self.damaged_lines += lines.damaged
        return list(lines.records)

    def _new_probes(self) -> list[Record]:
        found = queue.records(self._run_uri, self._seen_probes)
        self._seen_probes.update(found)
        return sorted(found.values(), key=lambda record: (record["step"], record["task"]))


@contextmanager
def watching(run_uri: str, subscribers: Sequence[Subscriber]) -> Iterator[None]:
    """Pass what is new in the run's directory to the subscribers inside the ``with``; at its end they have it all.

    One thread reads, and each subscriber is told in a thread of its own: one that is slow, or raises, holds up no
    other, and loses nothing but the news that it raised at.
    """
    reader = RunReader(run_uri)
    history = list(reader.read())  # what an earlier start of the same run left is no news
    deliveries = [_Delivery(run_uri, subscriber) for subscriber in subscribers]
    for delivery in deliveries:
        delivery.start(history)

    def look() -> list[News]:
        news: list[News] = []
        try:
            for one in reader.read():
                news.append(one)
        except Exception as error:  # storage is away for a while: what was missed comes with the next look
            logger.warning("Cannot read %s; retrying: %s", run_uri, error)
        return news

    ended = threading.Event()

    def keep_looking() -> None:
        interval = REMOTE_SECONDS if storage.is_remote(run_uri) else LOCAL_SECONDS
        while not ended.wait(interval):
            news = look()
            for delivery in deliveries:
                delivery.put(news)

    thread = threading.Thread(target=keep_looking, name="run-watcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        news = look()
        for delivery in deliveries:
            delivery.end(news)
        for delivery in deliveries:
            delivery.join()


class _Delivery:
    """Takes the news to one subscriber, in a thread."""

    def __init__(self, run_uri: str, subscriber: Subscriber) -> None:
        self._run_uri, self._subscriber = run_uri, subscriber
        self._batches: queues.SimpleQueue[list[News] | None] = queues.SimpleQueue()
        self._ended = threading.Event()
        self._failing: set[str] = set()  # kinds of calls that raised the last time: one warning for many in a row
        self._thread = threading.Thread(target=self._run, name=f"tell-{subscriber.name}", daemon=True)

    def start(self, history: list[News]) -> None:
        if self._subscriber.history:
            self._batches.put(history)
        self._thread.start()

    def put(self, news: list[News]) -> None:
        # One that is busy gets its next look when it comes to what waits.
        if news or self._batches.empty():
            self._batches.put(news)

    def end(self, news: list[News]) -> None:
        """Put the last news. From now on the subscriber is told of news, and of no look any more."""
        self._ended.set()
        self._batches.put(news)
        self._batches.put(None)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (news := self._batches.get()) is not None:
            for kind, value in news:
                self._call(kind, partial(self._subscriber.tell, kind, value))
            if not self._ended.is_set():
                self._call("look", self._subscriber.on_look)

    def _call(self, kind: str, callback: Callable[[], object]) -> None:
        try:
            callback()
        except Exception as error:
            if kind not in self._failing:
                who = f"{self._subscriber.name} of {self._run_uri}"
                logger.warning("The %s failed while handling a %s (%s: %s)", who, kind, type(error).__name__, error)
            self._failing.add(kind)
        else:
            self._failing.discard(kind)
