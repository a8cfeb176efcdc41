"""Metrics that a choice can follow: the validation loss, or the headline of a probe task.

    validation_loss       lower is better
    sts.spearman          the headline of the task `sts`, in the pooling where it is highest
    sts.mean.spearman     the same in one pooling

What follows one (`checkpoint.best`, a sweep's `metric`) names it so. A headline is better where it is higher.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from raybert.config_sections import VALIDATION_LOSS
from raybert.encode import POOLINGS
from raybert.errors import InputError
from raybert.probe import kinds
from raybert.probe.kind import ProbeTask


def names(tasks: Sequence[ProbeTask]) -> list[str]:
    """Every metric of a run with these tasks."""
    found = [VALIDATION_LOSS]
    for task in tasks:
        kind = kinds.of_task(task)
        key = kind.headline.key
        found += [f"{task.name}.{key}", *(f"{task.name}.{pooling}.{key}" for pooling in kind.poolings(task))]
    return found


def of_task(metric: str, task: str) -> bool:
    """Whether it is this task's, in whatever pooling. Tasks' names may hold dots."""
    return metric.rpartition(".")[0] in (task, *(f"{task}.{pooling}" for pooling in POOLINGS))


def check(setting: str, metric: str, tasks: Sequence[ProbeTask]) -> None:
    """
    Args:
        setting: the key that names the metric, for the sentence.
        tasks: that are probed.

    Raises:
        InputError: there is no such metric.
    """
    known = names(tasks)
    if metric in known:
        return
    if not tasks:
        raise InputError(
            f"{setting}={metric} is not a metric of this run, which has no probe tasks; use {VALIDATION_LOSS}, or "
            "set probe.tasks and every.probe."
        )
    near = difflib.get_close_matches(metric, known, n=1, cutoff=0.0)[0]
    headlines = ", ".join(f"{task.name}.{kinds.of_task(task).headline.key}" for task in tasks)
    raise InputError(
        f"{setting}={metric} is not a metric of this run; did you mean {near}? Its metrics are {VALIDATION_LOSS} "
        f"and the headlines of the probe tasks: {headlines}, each also for one pooling (TASK.POOLING.HEADLINE)."
    )


def value(metric: str, record: Mapping[str, Any]) -> float | None:
    """The metric in a probe record; None where it is of another task or has no result."""
    kind = kinds.of_record(record)
    prefix = f"{record['task']}."
    if kind is None or not metric.startswith(prefix) or record.get("status", "done") != "done":
        return None
    pooling, _, key = metric.removeprefix(prefix).rpartition(".")
    if key != kind.headline.key:
        return None
    found = [kind.headline.of(record.get(name)) for name in ([pooling] if pooling else kinds.poolings(record))]
    return max((each for each in found if each is not None), default=None)
