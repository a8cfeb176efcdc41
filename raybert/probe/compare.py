"""Two probe records of the same texts, compared text by text."""

from dataclasses import asdict
from typing import Any

from raybert.encode import POOLINGS
from raybert.errors import InputError
from raybert.probe.evaluate import unpack_bits
from raybert.probe.statistics import paired_bootstrap

Record = dict[str, Any]


def compare(a: Record, b: Record) -> Record:
    """Accuracy of B minus that of A, for each pooling, with its 95 % interval (see `paired_bootstrap`).

    Beside C = 1, which comes first, "tuned" compares the figures with C chosen, where both records have them.

    Raises:
        InputError: one of them is no result, or they are results of different texts.
    """
    for side, record in (("A", a), ("B", b)):
        if reason := _not_comparable(record):
            raise InputError(f"{side} is no probe result to compare: {reason}.")
    if a["texts"] != b["texts"]:
        raise InputError(
            f"A ({a['task']}) and B ({b['task']}) were probed with different texts; probe both with the same task."
        )
    poolings = {}
    for name in POOLINGS:
        poolings[name] = _paired(a, b, name, "correct") | {
            "a": a[name]["test_accuracy"],
            "b": b[name]["test_accuracy"],
        }
        if all(_is_tuned(record, name) for record in (a, b)):
            poolings[name]["tuned"] = _paired(a, b, name, "tuned_correct") | {
                "a": a[name]["tuned_accuracy"],
                "b": b[name]["tuned_accuracy"],
                "a_c": a[name]["tuned_c"],
                "b_c": b[name]["tuned_c"],
            }
    return {"task": a["task"], "n_test": a["n_test"], "a": _name(a), "b": _name(b), **poolings}


def _is_tuned(record: Record, pooling: str) -> bool:
    """Whether the record has all that a comparison of its tuned figures needs."""
    answers = record.get("tuned_correct", {}).get(pooling, "")
    figures = (record[pooling].get(key) for key in ("tuned_accuracy", "tuned_c"))
    return len(answers) == _digits(record) and all(figure is not None for figure in figures)


def _digits(record: Record) -> int:
    """Hexadecimal digits of the answers to all test texts."""
    return 2 * -(-(record.get("n_test") or 0) // 8)


def _paired(a: Record, b: Record, pooling: str, key: str) -> Record:
    n = a["n_test"]
    return asdict(paired_bootstrap(unpack_bits(a[key][pooling], n), unpack_bits(b[key][pooling], n)))


def _not_comparable(record: Record) -> str:
    """Why a record has no answers to single texts; empty where it has."""
    if record.get("status", "done") != "done":
        return str(record.get("reason") or record["status"])
    digits = _digits(record)
    answers = record.get("correct", {})
    if not digits or any(len(answers.get(name, "")) != digits for name in POOLINGS):
        return "it holds no answers to single texts"
    if not record.get("texts") or any("test_accuracy" not in (record.get(name) or {}) for name in POOLINGS):
        return "it lacks a part of the result"
    return ""


def _name(record: Record) -> str:
    return str(record.get("checkpoint") or f"{record.get('run')} step {record['step']}")
