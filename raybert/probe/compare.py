"""Two probe records of the same texts, compared text by text."""

from raybert.errors import InputError
from raybert.probe import kinds
from raybert.probe.kind import Record


def compare(a: Record, b: Record) -> Record:
    """The headline of B minus that of A, for each pooling, with its 95 % interval (see `Kind.compare`).

    Of classification, beside C = 1, "tuned" compares the figures with C chosen, where both records have them.

    Raises:
        InputError: one of them is not a result, or they are results of different texts.
    """
    for side, record in (("A", a), ("B", b)):
        if reason := _not_comparable(record):
            raise InputError(f"{side} cannot be compared: {reason}.")
    kind = kinds.of_record(a)
    if a["texts"] != b["texts"] or kind is None or kind is not kinds.of_record(b):
        raise InputError(
            f"A ({a['task']}) and B ({b['task']}) were probed with different texts; probe both with the same task."
        )
    poolings = {name: kind.compare(a, b, name) for name in kinds.poolings(a) if name in kinds.poolings(b)}
    return {
        "task": a["task"],
        **({"kind": kind.name} if kind.name != kinds.DEFAULT else {}),
        "n_test": a["n_test"],
        "a": _name(a),
        "b": _name(b),
        **poolings,
    }


def _not_comparable(record: Record) -> str:
    """Why a record has no figures of single texts; empty where it has."""
    if record.get("status", "done") != "done":
        return str(record.get("reason") or record["status"])
    kind = kinds.of_record(record)
    return kind.lacks(record) if kind else f"this version does not know the kind {record['kind']}"


def _name(record: Record) -> str:
    return str(record.get("checkpoint") or f"{record.get('run')} step {record['step']}")
