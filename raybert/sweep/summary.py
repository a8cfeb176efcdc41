"""What became of every trial of a sweep, read from the trials' directories."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from raybert import storage
from raybert.config_sections import VALIDATION_LOSS
from raybert.errors import InputError, RunFailed
from raybert.probe import kinds, metrics
from raybert.probe.service import queue
from raybert.probe.service.queue import Records
from raybert.records import END, FAILURE, METRICS, Lines, by_step, read_end, read_failure, read_lines
from raybert.report.read import CONFIG, LeftOut, Probe, Score, by_task, damage, read_settings
from raybert.sweep.space import SweepConfig, Trial, trials
from raybert.train.flops import run_flops_per_token

LR = "optimizer.lr"
# Reads at the same time: in a bucket each of them waits for an answer.
READERS = 16


@dataclass(frozen=True)
class Outcome:
    """One trial as far as it came."""

    name: str
    point: Mapping[str, Any]
    status: str  # finished, pruned, diverged, failed, interrupted, not started
    reason: str  # of a trial that diverged or failed; and what of its files cannot be read
    steps: int
    tokens: Sequence[float]  # at each validation
    losses: Sequence[float]  # of the validations
    flops_per_token: float
    probes: Mapping[str, Probe]  # task -> the last result

    @property
    def lr(self) -> float | None:
        return float(self.point[LR]) if LR in self.point else None

    @property
    def group(self) -> str:
        """What it is beside its learning rate: the size, mostly."""
        return ", ".join(f"{value}" for key, value in self.point.items() if key != LR) or "all"

    @property
    def loss(self) -> float | None:
        """The last validation loss; of a trial that diverged it says nothing."""
        return self.losses[-1] if self.losses and self.status != "diverged" else None

    @property
    def comparable(self) -> bool:
        """It ended as the sweep meant it to, and was validated after its first step."""
        return self.status in ("finished", "pruned") and bool(self.tokens) and self.tokens[-1] > 0


def read_sweep(sweep: SweepConfig) -> list[Outcome]:
    """The trials in their order, those that have not begun as well."""
    lengths: dict[str, int] = {}
    planned = trials(sweep)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda trial: _read(trial, lengths), planned))
    return [_outcome(trial, each, lengths) for trial, each in zip(planned, found, strict=True)]


@dataclass(frozen=True)
class _Found:
    """What lies in a trial's directory."""

    status: str
    reason: str
    records: Sequence[Mapping[str, Any]]
    probes: Sequence[Probe]


def _read(trial: Trial, lengths: dict[str, int]) -> _Found:
    """Read a trial, and note in `lengths` the tokens of a sample of its shards if they are not known yet."""
    uri, shards = trial.config.run_uri, trial.config.data.shards
    files = {path.rpartition("/")[2] for path in storage.list_dir(uri)}
    lines = read_lines(uri) if METRICS in files else Lines([], 0)
    results = queue.read_records(uri) if "probes" in files else Records({}, {})
    left_out, records = damage(lines, results), by_step(lines.records)
    status, reason = _end(uri, files, done=_steps(records) >= trial.config.train.steps)
    if shards not in lengths and CONFIG in files:
        try:
            if seq_len := read_settings(uri)[1].get("seq_len"):
                lengths[shards] = int(seq_len)
        except (InputError, TypeError, ValueError):
            left_out.append(LeftOut(CONFIG, "cannot be read"))
    parts = (reason, *(f"ignored: {part}" for part in left_out))
    return _Found(status, "; ".join(part for part in parts if part), records, by_task(results)[0])


def _steps(records: Sequence[Mapping[str, Any]]) -> int:
    return max((record["step"] for record in records), default=0)


def _outcome(trial: Trial, found: _Found, lengths: Mapping[str, int]) -> Outcome:
    seq_len = lengths.get(trial.config.data.shards, 0)
    validated = [record for record in found.records if "loss" in record.get("validation", {})]
    return Outcome(
        name=trial.name,
        point=trial.point,
        status=found.status,
        reason=found.reason,
        steps=_steps(found.records),
        tokens=[record["step"] * trial.config.train.global_batch * seq_len for record in validated],
        losses=[float(record["validation"]["loss"]) for record in validated],
        flops_per_token=run_flops_per_token(trial.config, seq_len),
        probes={probe.task: probe for probe in found.probes},  # by step, so the last one stays
    )


def _end(uri: str, files: set[str], *, done: bool) -> tuple[str, str]:
    """A trial's status, and why it is so."""
    failure = read_failure(uri) if FAILURE in files else {}
    if failure.get("kind") == "diverged":
        return "diverged", failure["reason"]
    if END in files:
        end = read_end(uri)
        if end["status"] != "pruned" or not done:  # else its last step came before the word that stopped it
            return end["status"], end["reason"]
    if failure:
        return "failed", failure["reason"]
    if done:
        return "finished", ""
    return ("interrupted", "") if "config.yaml" in files else ("not started", "")


def note_end(run_uri: str, status: str, reason: str = "") -> None:
    """Record how a trial ended that was stopped or failed."""
    storage.write_json(storage.join(run_uri, END), {"status": status, "reason": reason})


def tasks_of(outcomes: Sequence[Outcome]) -> list[str]:
    """The probe tasks that have a result."""
    return list(dict.fromkeys(task for outcome in outcomes for task in outcome.probes))


def figure(metric: str, outcome: Outcome) -> float | None:
    """The final value of the sweep's metric: by the last validation, or by the probe of the last step."""
    if metric == VALIDATION_LOSS or outcome.loss is None:
        return outcome.loss
    found = [metrics.value(metric, probe.raw) for probe in outcome.probes.values() if probe.step == outcome.steps]
    return next((value for value in found if value is not None), None)


def ranked(metric: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The trials by the sweep's metric, the best first; those without one come last."""
    sign = 1 if metric == VALIDATION_LOSS else -1

    def place(outcome: Outcome) -> float:
        value = figure(metric, outcome)
        return math.inf if value is None else sign * value

    return sorted(outcomes, key=place)


def best(metric: str, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The finished trial that is best by the sweep's metric."""
    finished = [o for o in outcomes if o.status == "finished" and o.comparable and figure(metric, o) is not None]
    return next(iter(ranked(metric, finished)), None)


def sentence_of_best(metric: str, outcomes: Sequence[Outcome]) -> str:
    """Which trial is the best, in words; empty while none is finished."""
    winner = best(metric, outcomes)
    if winner is None:
        finished = any(outcome.status == "finished" for outcome in outcomes)
        return f"No finished trial has {metric} at its last step" if finished else ""
    value, name = figure(metric, winner), "validation loss" if metric == VALIDATION_LOSS else metric
    return f"Best finished trial: {winner.name} with {name} {value:.4f}"


def require_none_failed(outcomes: Sequence[Outcome]) -> None:
    """
    Raises:
        RunFailed: some trials failed; those that were pruned, or whose loss diverged, have not.
    """
    failed = [o for o in outcomes if o.status == "failed"]
    if failed:
        reasons = "; ".join(f"{o.name}: {o.reason.rstrip('.')}" for o in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise RunFailed(
            f"{len(failed)} of {len(outcomes)} trials failed: {reasons}{more}. Rerun the same command with "
            "--resume to retry them."
        )


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The outcomes without their curves."""
    return [
        {
            "trial": o.name,
            **o.point,
            "status": o.status,
            "reason": o.reason,
            "steps": o.steps,
            "validation_loss": o.loss,
            "probes": {task: _probe_json(probe) for task, probe in o.probes.items()},
        }
        for o in outcomes
    ]


def _probe_json(probe: Probe) -> dict[str, Any]:
    """A result beside what it has to be compared with."""
    baselines, key = probe.baselines, probe.kind.headline.key
    start = {pooling: _score_json(score, key) for pooling, score in baselines.start.items()}
    beyond = {
        pooling: {name: found[name] for name in ("difference", "interval")}
        for pooling, found in probe.raw.get("beyond_start", {}).items()
    }
    return {
        "step": probe.step,
        **{pooling: _score_json(score, key) for pooling, score in probe.scores.items()},
        "untrained": {pooling: _score_json(score, key) for pooling, score in baselines.untrained.items()},
        **({"start": start, "beyond_start": beyond} if start else {}),
        **{name: _score_json(baselines.plain.get(name), key) for name in kinds.BASELINES},
    }


def _score_json(score: Score | None, key: str) -> dict[str, Any] | None:
    """None where the record has no such figure, or the task's kind no such baseline."""
    if score is None:
        return None
    tuned = {"tuned_accuracy": score.tuned_accuracy, "tuned_c": score.tuned_c}
    return {
        key: score.value,
        "interval": score.interval,
        **{name: value for name, value in tuned.items() if value is not None},
        **({"collapsed": score.collapsed} if score.collapsed else {}),
    }


def collapses(task: str, outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each trial whose last vectors of this task have collapsed: which poolings, and a sentence."""
    return [
        f"{o.name}, {', '.join(found)}: {next(iter(found.values()))}"
        for o in outcomes
        if task in o.probes and (found := o.probes[task].collapsed)
    ]
