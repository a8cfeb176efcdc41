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
    n = a["n_test"]
    poolings = {
        name: asdict(paired_bootstrap(unpack_bits(a["correct"][name], n), unpack_bits(b["correct"][name], n)))
        | {"a": a[name]["test_accuracy"], "b": b[name]["test_accuracy"]}
        for name in POOLINGS
    }
    return {"task": a["task"], "n_test": n, "a": _name(a), "b": _name(b), **poolings}


def _not_comparable(record: Record) -> str:
    """Why a record has no answers to single texts; empty where it has."""
    if record.get("status", "done") != "done":
        return str(record.get("reason") or record["status"])
    digits = 2 * -(-(record.get("n_test") or 0) // 8)
    answers = record.get("correct", {})
    if not digits or any(len(answers.get(name, "")) != digits for name in POOLINGS):
        return "it holds no answers to single texts"
    if not record.get("texts") or any("test_accuracy" not in (record.get(name) or {}) for name in POOLINGS):
        return "it lacks a part of the result"
    return ""


def _name(record: Record) -> str:
    return str(record.get("checkpoint") or f"{record.get('run')} step {record['step']}")
