"""What a run tells while it goes on: metrics.jsonl, and Ray's metrics registry. Reading back is in raybert.records."""

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from raybert import storage
from raybert.records import GAUGES, METRICS
from raybert.storage.growing import GrowingFile

COUNTERS = {
    "wait_data_seconds_total": "seconds that the step waited for data",
    "wait_checkpoint_seconds_total": "seconds that the step waited for checkpoints",
    "wait_report_seconds_total": "seconds that the step waited for reports to the controller",
    "samples_total": "samples trained on",
}


def tags_of(run_uri: str) -> dict[str, str]:
    """What a run is called in metrics: its name, or those of its sweep and its trial (SWEEP/trials/TRIAL)."""
    *above, parent, name = run_uri.rstrip("/").split("/")
    return {"run": above[-1], "trial": name} if parent == "trials" and above else {"run": name, "trial": ""}


class Board:
    """Gauges that stay in view. Ray 2.60 exports a gauge only when it was set since the last export (10 seconds), so
    what is set once a checkpoint would show for a moment; here every value is set again and again, by a thread.

    Args:
        gauges: name -> (description, tag keys); exported as ``ray_raybert_<name>``.
    """

    INTERVAL = 2.0  # seconds

    def __init__(self, gauges: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
        self._gauges = {name: Gauge(f"raybert_{name}", text, keys) for name, (text, keys) in gauges.items()}
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._repeat, name="gauges", daemon=True).start()

    def set(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        self._gauges[name].set(value, dict(tags))
        with self._lock:
            self._values[name, frozenset(tags.items())] = value

    def forget(self, tags: Mapping[str, str]) -> None:
        """Drop all values whose tags include these."""
        with self._lock:
            self._values = {key: value for key, value in self._values.items() if not key[1] >= tags.items()}

    def _repeat(self) -> None:
        while True:
            time.sleep(self.INTERVAL)
            with self._lock:
                values = list(self._values.items())
            for (name, tags), value in values:
                self._gauges[name].set(value, dict(tags))


class Gauges:
    """The run's numbers in Ray's registry, exported to Prometheus as ``ray_raybert_<name>{run, trial}``."""

    def __init__(self, run_uri: str) -> None:
        self._tags = tags_of(run_uri)
        keys = tuple(self._tags)
        self._board = Board({name: (text, keys) for name, text in GAUGES.items()})
        self._counters = {name: Counter(f"raybert_{name}", text, keys) for name, text in COUNTERS.items()}

    def set(self, values: Mapping[str, float]) -> None:
        """Set the gauges that are named in ``values``; other names are ignored."""
        for name in values.keys() & GAUGES.keys():
            self._board.set(name, values[name], self._tags)

    def add(self, values: Mapping[str, float]) -> None:
        """Increase the counters that are named in ``values``."""
        for name in values.keys() & COUNTERS.keys():
            if values[name] > 0:
                self._counters[name].inc(values[name], self._tags)


class MetricsLog:
    """RUN/metrics.jsonl, written by one process. A restarted run appends to the same file."""

    def __init__(self, run_uri: str) -> None:
        self._file = GrowingFile(storage.join(run_uri, METRICS))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; a reader of the local file sees it at once."""
        self._file.append([json.dumps(dict(values), allow_nan=False)])

    def sync(self) -> None:
        """Have all that was written so far in storage, also where that is remote. Nothing to do once it is closed."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()
