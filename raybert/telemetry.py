"""What a run tells about itself: metrics.jsonl, Ray's metrics registry, and the log line that a person reads."""

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from raybert import storage
from raybert.storage.growing import GrowingFile

GAUGES = {
    "loss": "training loss, MLM + next sentence (nats)",
    "mlm_loss": "masked-language-model loss (nats per masked token)",
    "nsp_loss": "next-sentence loss (nats per sample)",
    "mlm_accuracy": "share of masked tokens predicted right",
    "nsp_accuracy": "share of sentence pairs classified right",
    "validation_loss": "loss on the validation samples (nats)",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens trained on per second, over all workers",
    "mfu": "share of the measured peak matrix-multiplication rate",
    "step": "optimizer steps done",
    "checkpoint_bytes": "size of the last checkpoint",
    "checkpoint_seconds": "seconds that writing the last checkpoint took, beside training",
    "restarts": "times the worker group was started again",
}
COUNTERS = {
    "wait_data_seconds_total": "seconds that the step waited for data",
    "wait_checkpoint_seconds_total": "seconds that the step waited for checkpoints",
    "wait_report_seconds_total": "seconds that the step waited for reports to the controller",
    "samples_total": "samples trained on",
}


FAILURE = "failure.json"  # in the run directory of a run that ended before its last step, and why
END = "outcome.json"  # in that of a sweep's trial that did not come to its own end: status and reason


def read_failure(run_uri: str) -> dict[str, Any]:
    """step, reason and kind ("diverged", "data") of a run that gave up; empty where it did not."""
    return _read_or_empty(storage.join(run_uri, FAILURE))


def read_end(run_uri: str) -> dict[str, Any]:
    """status and reason of a trial that its sweep ended, or that failed; empty where there is nothing of the kind."""
    return _read_or_empty(storage.join(run_uri, END))


def _read_or_empty(uri: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = storage.read_json(uri)
    except FileNotFoundError:
        return {}
    return found


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
        """Show no value any more whose tags include these."""
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
        """Raise the counters that are named in ``values``."""
        for name in values.keys() & COUNTERS.keys():
            if values[name] > 0:
                self._counters[name].inc(values[name], self._tags)


class MetricsLog:
    """RUN/metrics.jsonl, written by one process. A restarted run goes on in the same file."""

    def __init__(self, run_uri: str) -> None:
        self._file = GrowingFile(storage.join(run_uri, "metrics.jsonl"))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; a reader of the local file sees it at once."""
        self._file.append([json.dumps(dict(values), allow_nan=False)])

    def sync(self) -> None:
        """Have all that was written so far in storage, also where that is remote. Nothing to do once it is closed."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """The logged steps in order. Of a step that a restarted run logged twice the last line counts.

    A half-written last line is passed over. Empty while there is no file.
    """
    uri = storage.join(run_uri, "metrics.jsonl")
    if not storage.exists(uri):
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in storage.read_bytes(uri).decode("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            by_step[record["step"]] = {**by_step.get(record["step"], {}), **record}
    return [by_step[step] for step in sorted(by_step)]


def format_line(record: Mapping[str, Any], total_steps: int) -> str:
    """One line that a person can take in."""
    step = f"step {record['step']:>6}/{total_steps}"
    parts = [step]
    if "loss" in record:
        waits = 100 * record["wait_data"]
        parts += [
            f"loss {record['loss']:.4f} (mlm {record['mlm_loss']:.4f} nsp {record['nsp_loss']:.4f})",
            f"acc mlm {record['mlm_accuracy']:.3f} nsp {record['nsp_accuracy']:.3f}",
            f"lr {record['lr']:.2e}",
            f"norm {record['grad_norm']:.2f}",
            f"{record['tokens_per_second']:,.0f} tok/s",
            f"mfu {100 * record['mfu']:.1f}%",
            f"waiting on data {waits:.1f}%",
            f"eta {format_seconds(record['eta_seconds'])}",
        ]
    if "validation" in record:
        found = record["validation"]
        parts.append(
            f"validation loss {found['loss']:.4f} (mlm {found['mlm_loss']:.4f} nsp {found['nsp_loss']:.4f}) "
            f"acc mlm {found['mlm_accuracy']:.3f} nsp {found['nsp_accuracy']:.3f}"
        )
    return " | ".join(parts)


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
