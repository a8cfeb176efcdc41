"""Following a run from its driver: what is logged, what went wrong, and probe results as they arrive."""

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

from raybert import storage
from raybert.probe.service import client
from raybert.train.recovery import faults

logger = logging.getLogger(__name__)
Record = dict[str, Any]


class Watcher:
    """Calls back for every new line of metrics.jsonl, every probe record and every fault, from a thread of its own.

    Use it as a context manager around `raybert.train.run.train`. It reads the run directory, so what is shown is what
    was recorded, wherever the workers are. With `history` it begins with what lies there already. `on_look` is called
    after each look, whether there was news or not.
    """

    def __init__(
        self,
        run_uri: str,
        *,
        on_record: Callable[[Record], None],
        on_probe: Callable[[Record], None],
        on_fault: Callable[[Record], None] | None = None,
        on_look: Callable[[], None] | None = None,
        history: bool = False,
    ) -> None:
        self._run_uri = run_uri
        self._metrics = storage.join(run_uri, "metrics.jsonl")
        self._on_record, self._on_probe, self._on_fault, self._on_look = on_record, on_probe, on_fault, on_look
        self._offset = 0
        self._seen: set[str] = set()
        self._seen_faults: set[str] = set()
        if not history:  # what an earlier start of the same run left is not news
            self._offset = len(storage.read_from(self._metrics, 0))
            faults.read(run_uri, self._seen_faults)
            client.new_results(run_uri, self._seen)
        self._interval = 10.0 if storage.is_remote(run_uri) else 0.5
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="run-watcher", daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _follow(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def _look(self) -> None:
        try:
            self.poll()
        except Exception as error:  # storage is away for a while: what was missed is shown at the next look
            logger.warning("Cannot look into %s for now: %s", self._run_uri, error)

    def poll(self) -> None:
        """Pass on what is new since the last call."""
        content = storage.read_from(self._metrics, self._offset)
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._on_record(json.loads(line))
        if self._on_fault is not None:
            for fault in faults.read(self._run_uri, self._seen_faults):
                self._on_fault(fault)
        for result in client.new_results(self._run_uri, self._seen):
            self._on_probe(result)
        if self._on_look is not None:
            self._on_look()
