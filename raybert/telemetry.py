"""What a run tells about itself: metrics.jsonl, Ray's metrics registry, and the log line that a person reads."""

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

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


METRICS = "metrics.jsonl"
FAILURE = "failure.json"  # in the run directory of a run that ended before its last step, and why
END = "outcome.json"  # in that of a sweep's trial that did not come to its own end: status and reason


def read_failure(run_uri: str) -> dict[str, str]:
    """reason and kind ("diverged", "data") of a run that gave up; empty where it did not."""
    return _read_ending(storage.join(run_uri, FAILURE), {"reason": "", "kind": ""})


def read_end(run_uri: str) -> dict[str, str]:
    """status and reason of a trial that its sweep ended, or that failed; empty where there is nothing of the kind."""
    return _read_ending(storage.join(run_uri, END), {"reason": "", "status": "failed"})


def _read_ending(uri: str, default: dict[str, str]) -> dict[str, str]:
    """The file alone says that something ended. Where it is damaged, that is all that is known."""
    try:
        found = read_object(uri)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        return default | {"reason": f"{uri}, which says why it ended, cannot be read: {error}"}
    return {key: str(found.get(key, value)) for key, value in default.items()}


# -- reading back what a power loss, or somebody, may have damaged --------------------------------------------------

LARGEST = 2**53  # of a step or count: above it a float is no longer exact
LARGEST_FIGURE = 3.5e38  # what float32 can hold, in which losses and norms are computed
# Of a line of metrics.jsonl: numbers, if they are there. "validation" holds numbers too; other names are not checked.
FIGURES = frozenset(
    [*GAUGES, "samples", "epoch", "elapsed_seconds", "eta_seconds", "workers", "skipped"]
    + [f"wait_{kind}" for kind in ("data", "checkpoint", "report", "validation")]
) - {"step"}


def read_object(uri: str) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it holds anything else; the message says what is wrong.
    """
    return parse_object(storage.read_bytes(uri))


def parse_object(content: bytes) -> dict[str, Any]:
    """One JSON object in UTF-8, without NaN and infinite numbers, which JSON does not have.

    Raises:
        ValueError: it is anything else; the message says what is wrong.
    """
    try:
        text = content.decode()
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        if "\\u" in text:  # half a surrogate pair could not be written out again
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError("not UTF-8") from error
    except json.JSONDecodeError as error:
        what = "not JSON" if content.strip(b"\0 \t\r\n") else "empty"
        raise ValueError(f"{what} ({error})" if what != "empty" else what) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} and not an object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def is_number(value: Any, largest: float = LARGEST_FIGURE) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


@dataclass(frozen=True)
class Lines:
    """What a part of metrics.jsonl holds: its good lines in order, and how many cannot be read."""

    records: Sequence[dict[str, Any]]
    damaged: int


def parse_lines(content: bytes) -> Lines:
    """The lines of a log. Empty ones do not count; a last one without its end does."""
    records, damaged = [], 0
    for line in content.split(b"\n"):
        if line.strip():
            try:
                records.append(_checked(parse_object(line)))
            except ValueError:
                damaged += 1
    return Lines(records, damaged)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """
    Raises:
        ValueError: it has no step, or something that is no number where one belongs.
    """
    if not is_count(record.get("step")):
        raise ValueError("no step")
    figures = {key: value for key, value in record.items() if key in FIGURES}
    validation = record.get("validation", {})
    if not isinstance(validation, dict) or not all(map(is_number, (*figures.values(), *validation.values()))):
        raise ValueError("no number where one belongs")
    return record


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


def read_lines(run_uri: str) -> Lines:
    """RUN/metrics.jsonl as it was written, restarts and all; nothing while there is no file."""
    return parse_lines(storage.read_from(storage.join(run_uri, METRICS), 0))


def by_step(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record a step, in order. Of a step that a restarted run logged twice the last line counts."""
    merged: dict[int, dict[str, Any]] = {}
    for record in records:
        merged[record["step"]] = {**merged.get(record["step"], {}), **record}
    return [merged[step] for step in sorted(merged)]


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """The logged steps in order (see `by_step`). Lines that cannot be read are passed over."""
    return by_step(read_lines(run_uri).records)


LINE = {  # of a log line: its records' keys and how they are shown together
    ("loss", "mlm_loss", "nsp_loss"): "loss {:.4f} (mlm {:.4f} nsp {:.4f})",
    ("mlm_accuracy", "nsp_accuracy"): "acc mlm {:.3f} nsp {:.3f}",
    ("lr",): "lr {:.2e}",
    ("grad_norm",): "norm {:.2f}",
    ("tokens_per_second",): "{:,.0f} tok/s",
    ("mfu",): "mfu {:.1%}",
    ("wait_data",): "waiting on data {:.1%}",
}


def format_line(record: Mapping[str, Any], total_steps: int) -> str:
    """One line that a person can take in, as far as the record has its figures."""
    parts = [f"step {record['step']:>6}/{total_steps}"]
    if "loss" in record:
        parts += _shown(record)
        if "eta_seconds" in record:
            parts.append(f"eta {format_seconds(record['eta_seconds'])}")
    if found := record.get("validation"):
        losses, *accuracies = _shown(found) or [""]
        parts.append(" ".join(["validation", losses, *accuracies]))
    return " | ".join(parts)


def _shown(figures: Mapping[str, float]) -> list[str]:
    return [form.format(*map(figures.get, keys)) for keys, form in LINE.items() if figures.keys() >= set(keys)]


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
