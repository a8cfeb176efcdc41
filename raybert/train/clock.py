"""Where the wall time of a worker goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = ("data", "checkpoint", "report", "validation")


class Clock:
    """Times what a worker waits for. `lap` closes an interval and starts the next.

    Other threads may read what it is at (`phase`) and how far it is.
    """

    def __init__(self) -> None:
        self.step = 0  # the last one that was done
        self.progress = 0  # grows whenever anything was done
        self.start()
        self.phase = "start"

    def start(self) -> None:
        self._begun = self._lap = time.perf_counter()
        self._waits = dict.fromkeys(KINDS, 0.0)
        self.phase = "step"

    @contextmanager
    def waiting(self, kind: str) -> Iterator[None]:
        start, before = time.perf_counter(), self.phase
        self.phase = kind
        self.progress += 1
        try:
            yield
        finally:
            self._waits[kind] += time.perf_counter() - start
            self.phase = before
            self.progress += 1

    def done(self, step: int) -> None:
        self.step = step
        self.progress += 1

    def since_lap(self) -> float:
        return time.perf_counter() - self._lap

    def total(self) -> float:
        return time.perf_counter() - self._begun

    def lap(self) -> dict[str, float]:
        """Seconds of the interval, and seconds of it spent waiting for each kind."""
        found = {"seconds": self.since_lap(), **self._waits}
        self._lap = time.perf_counter()
        self._waits = dict.fromkeys(KINDS, 0.0)
        return found
