"""What a run wrote, read back as plain records: JSON objects, the lines of metrics.jsonl, how a run or a trial ended.

A power loss, or somebody, may have damaged any of it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from raybert import storage

METRICS = "metrics.jsonl"
FAILURE = "failure.json"  # in the run directory of a run that ended before its last step, and why
END = "outcome.json"  # in that of a sweep's trial that did not come to its own end: status and reason

LARGEST = 2**53  # of a step or count: above it a float is no longer exact
LARGEST_FIGURE = 3.5e38  # what float32 can hold, in which losses and norms are computed
GAUGES = {
    "loss": "training loss, the weighted sum of those of the objective (nats)",
    "mlm_loss": "masked-language-model loss (nats per masked token)",
    "nsp_loss": "next-sentence loss (nats per sample)",
    "contrast_loss": "contrastive loss (nats per pair)",
    "bag_loss": "bag-of-words loss (nats per word)",
    "mlm_accuracy": "fraction of masked tokens predicted correctly",
    "nsp_accuracy": "fraction of sentence pairs classified correctly",
    "contrast_accuracy": "fraction of texts whose other half is nearest",
    "validation_loss": "loss on the validation samples (nats)",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens trained on per second, over all workers",
    "mfu": "fraction of the measured peak matrix-multiplication rate",
    "step": "optimizer steps done",
    "checkpoint_bytes": "size of the last checkpoint",
    "checkpoint_seconds": "seconds to write the last checkpoint, in the background",
    "restarts": "restarts of the worker group",
}
# Of a line of metrics.jsonl: numbers, if they are there. "validation" holds numbers too; other names are not checked.
FIGURES = frozenset(
    [*GAUGES, "samples", "epoch", "elapsed_seconds", "eta_seconds", "workers", "skipped", "filled", "shapes"]
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
        raise ValueError(f"a {type(found).__name__}, not an object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it contains {constant}, which is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def is_number(value: Any, largest: float = LARGEST_FIGURE) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


@dataclass(frozen=True)
class Lines:
    """A part of metrics.jsonl: its readable lines in order, and the number of unreadable ones."""

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
        ValueError: it has no step, or a figure in it is not a number.
    """
    if not is_count(record.get("step")):
        raise ValueError("no step")
    figures = {key: value for key, value in record.items() if key in FIGURES}
    validation = record.get("validation", {})
    if not isinstance(validation, dict) or not all(map(is_number, (*figures.values(), *validation.values()))):
        raise ValueError("a figure is not a number")
    return record


def read_failure(run_uri: str) -> dict[str, str]:
    """reason and kind ("diverged", "data") of a run that gave up; empty where it did not."""
    return _read_ending(storage.join(run_uri, FAILURE), {"reason": "", "kind": ""})


def read_end(run_uri: str) -> dict[str, str]:
    """status and reason of a trial that its sweep ended, or that failed; empty otherwise."""
    return _read_ending(storage.join(run_uri, END), {"reason": "", "status": "failed"})


def _read_ending(uri: str, default: dict[str, str]) -> dict[str, str]:
    """The file alone says that something ended. Where it is damaged, that is all that is known."""
    try:
        found = read_object(uri)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        return default | {"reason": f"{uri}, which records why it ended, cannot be read: {error}"}
    return {key: str(found.get(key, value)) for key, value in default.items()}


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
    """The logged steps in order (see `by_step`). Lines that cannot be read are skipped."""
    return by_step(read_lines(run_uri).records)


LINE = {  # of a log line, after losses and accuracies: its records' keys and how they are shown
    "lr": "lr {:.2e}",
    "grad_norm": "norm {:.2f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "mfu {:.1%}",
    "wait_data": "waiting on data {:.1%}",
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
    losses, accuracies = (
        _joined_figures(figures, f"_{kind}", form) for kind, form in (("loss", "{:.4f}"), ("accuracy", "{:.3f}"))
    )
    parts = [f"loss {figures['loss']:.4f}" + f" ({losses})" * bool(losses)] if "loss" in figures else []
    parts += [f"acc {accuracies}"] * bool(accuracies)
    return parts + [form.format(figures[key]) for key, form in LINE.items() if key in figures]


def _joined_figures(figures: Mapping[str, float], suffix: str, form: str) -> str:
    """Those of the objective's losses that are on: "mlm 7.1234 nsp 0.6931"."""
    found = {key.removesuffix(suffix): value for key, value in figures.items() if key.endswith(suffix)}
    return " ".join(f"{name} {form.format(value)}" for name, value in found.items())


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
