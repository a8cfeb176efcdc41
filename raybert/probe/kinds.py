"""The kinds of probe tasks, by the name that a task's `kind` says. A record that names none is of classification."""

from collections.abc import Mapping, Sequence
from typing import Any

from raybert.encode import POOLINGS
from raybert.probe.classification import Classification
from raybert.probe.finetune import Finetune
from raybert.probe.kind import Kind, ProbeTask
from raybert.probe.neighbours import Neighbours
from raybert.probe.retrieval import Retrieval
from raybert.probe.similarity import Similarity

DEFAULT = Classification.name
KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (Classification(), Similarity(), Retrieval(), Neighbours(), Finetune())
}
# Of all kinds, in the order in which they are shown.
BASELINES = {"majority": "majority class", "tfidf": "TF-IDF", "bm25": "BM25"}


def of_task(task: ProbeTask) -> Kind:
    return KINDS[task.kind]


def of_record(record: Mapping[str, Any]) -> Kind | None:
    """None for a kind that this version does not know: such a record is skipped."""
    return KINDS.get(record.get("kind", DEFAULT))


def baselines(record: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """The headlines that a record's own are to be compared with: the baseline's name, the pooling (empty where there is
    no encoder), the figure.
    """
    kind, found = of_record(record), record.get("baselines") or {}
    if kind is None:
        return []
    listed = [(name, "", found.get(name)) for name in BASELINES]
    for name in ("untrained", "start"):
        listed += [(name, pooling, entry) for pooling, entry in (found.get(name) or {}).items()]
    values = [(name, pooling, kind.headline.of(entry)) for name, pooling, entry in listed]
    return [(name, pooling, value) for name, pooling, value in values if value is not None]


def passes(tasks: Sequence[ProbeTask]) -> list[list[ProbeTask]]:
    """The tasks in the order in which they are probed: those that read a common file share a pass of the encoder, which
    may be shorter than one of each; those that train it come last, each alone."""
    left = [task for task in tasks if not of_task(task).costly]
    found = []
    while left:
        first = left[0]
        files = {uri for uri, _ in first.files}
        together = [first, *(task for task in left[1:] if files & {uri for uri, _ in task.files})]
        found.append(together)
        left = [task for task in left if task not in together]
    return found + [[task] for task in tasks if of_task(task).costly]


def poolings(record: Mapping[str, Any]) -> list[str]:
    """The poolings for which a record has its headline: those that are known first, in their order."""
    kind = of_record(record)
    found = [name for name, entry in record.items() if kind is not None and kind.headline.of(entry) is not None]
    return [*(name for name in POOLINGS if name in found), *(name for name in found if name not in POOLINGS)]
