"""All probe tasks of a run side by side: start, first, best and last headline, and a suite's average."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raybert.report.read import Probe, RunData


@dataclass(frozen=True)
class Row:
    """A task, in the pooling of its best result; or a suite's average. Headlines as text, times 100."""

    name: str
    pooling: str
    start: str
    first: str
    best: str
    last: str


def overview(run: RunData) -> list[Row]:
    """A row a task that has a result after its start; then the suite's, where all of its tasks have one."""
    rows, parts = [], {}
    for task in run.tasks:
        best = run.best(task)
        if best is None:
            continue
        probe, pooling = best
        trained = run.trained(task)
        values = [
            probe.baselines.start[pooling].value if pooling in probe.baselines.start else None,
            _value(trained[0], pooling),
            probe.scores[pooling].value,
            _value(trained[-1], pooling),
        ]
        parts[task] = values
        rows.append(Row(f"{task}, {probe.kind.headline.label}", pooling, *_shown(values)))
    name, members = run.suite
    if members and all(task in parts for task in members):
        columns = zip(*(parts[task] for task in members), strict=True)
        means = [None if None in column else float(np.mean(column)) for column in columns]
        rows.append(Row(f"{name}: mean of {', '.join(members)}", "best of each", *_shown(means)))
    return rows


def _value(probe: Probe, pooling: str) -> float | None:
    return probe.scores[pooling].value if pooling in probe.scores else None


def _shown(values: Sequence[float | None]) -> list[str]:
    return ["–" if value is None else f"{100 * value:.1f}" for value in values]
