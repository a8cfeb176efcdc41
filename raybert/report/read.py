"""A run directory, read into plain values. Everything that is shown of a run comes from here."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raybert import storage
from raybert.config import look_up, read_yaml_mapping, run_directory
from raybert.encode import POOLINGS
from raybert.telemetry import read_failure, read_metrics

PROBE_FILE = re.compile(r"(?P<task>.+)-(?P<step>\d{8})\.json")
WAITS = ("data", "checkpoint", "report", "validation")


@dataclass(frozen=True)
class Score:
    """One classifier's result on a probe task. Shares in 0..1; None where the record does not say."""

    accuracy: float
    interval: tuple[float, float] | None = None
    train_accuracy: float | None = None
    macro_f1: float | None = None
    tuned_accuracy: float | None = None
    tuned_c: float | None = None
    collapsed: str = ""  # a sentence, of vectors that have

    def __str__(self) -> str:
        """``71.2 % [68.9, 73.4]``: the accuracy with its interval, as far as the record has one."""
        text = percent(self.accuracy)
        return f"{text} [{100 * self.interval[0]:.1f}, {100 * self.interval[1]:.1f}]" if self.interval else text


@dataclass(frozen=True)
class Baselines:
    """What a probe's accuracy is to be compared with: no features, no training, the run's start, no encoder."""

    majority: Score | None = None
    untrained: Mapping[str, Score] = field(default_factory=dict)
    start: Mapping[str, Score] = field(default_factory=dict)
    start_absent: str = ""  # why there is none
    tfidf: Score | None = None
    tfidf_absent: str = ""  # why there is none


@dataclass(frozen=True)
class Probe:
    """The result of one task at one step. `scores` has an entry a pooling; `raw` is the record itself."""

    task: str
    step: int
    scores: Mapping[str, Score]
    baselines: Baselines
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class Missed:
    """A probe that has no result, and why."""

    task: str
    step: int
    status: str
    reason: str


@dataclass(frozen=True)
class Restart:
    """The log stood at `before` and went on at `after`."""

    before: int
    after: int
    workers: int | None


@dataclass(frozen=True)
class RunData:
    """A run as far as it has come."""

    uri: str
    settings: Mapping[str, Any]  # the resolved config
    about: Mapping[str, Any]  # versions, manifest
    records: Sequence[Mapping[str, Any]]  # metrics.jsonl, one a step, in order
    restarts: Sequence[Restart]
    probes: Sequence[Probe]
    missed: Sequence[Missed]
    failure: str

    @property
    def name(self) -> str:
        return str(self.setting("run.name", storage.absolute(self.uri).rsplit("/", 1)[-1]))

    @property
    def cadences(self) -> int:
        """The step behind which the present settings say what is due; before it there may have been others."""
        return int(self.about.get("cadences", 0))

    @property
    def steps_done(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def steps_planned(self) -> int:
        return int(self.setting("train.steps", self.steps_done))

    @property
    def tasks(self) -> list[str]:
        """The packaged tasks of the config, then those of the results (a YAML file's name is known from them)."""
        specs = [str(spec) for spec in self.setting("probe.tasks", [])]
        packaged = [spec.partition("@")[0] for spec in specs if not spec.endswith((".yaml", ".yml"))]
        return list(dict.fromkeys([*packaged, *(p.task for p in self.probes), *(m.task for m in self.missed)]))

    def of_task(self, task: str) -> list[Probe]:
        return [probe for probe in self.probes if probe.task == task]

    def missed_of(self, task: str) -> list[Missed]:
        return [missed for missed in self.missed if missed.task == task]

    def trained(self, task: str) -> list[Probe]:
        """The results of the task after the start."""
        return [probe for probe in self.of_task(task) if probe.step > 0]

    def best(self, task: str) -> tuple[Probe, str] | None:
        """The trained probe and the pooling of the highest test accuracy."""
        pairs = [(probe, pooling) for probe in self.trained(task) for pooling in probe.scores]
        return max(pairs, key=lambda pair: pair[0].scores[pair[1]].accuracy, default=None)

    def unrecorded(self, task: str) -> list[int]:
        """Steps that were due for a probe, by the present settings, and have neither result nor reason."""
        every = self.setting("every.probe", 0)
        if not every:
            return []
        due = {step for step in range(every, self.steps_done + 1, every) if step > self.cadences}
        if self.steps_done >= self.steps_planned:
            due.add(self.steps_planned)
        return sorted(due - {p.step for p in self.of_task(task)} - {m.step for m in self.missed_of(task)})

    @property
    def over(self) -> bool:
        """All steps done and each probe recorded, or failed: nothing will be added."""
        done = self.steps_done >= self.steps_planned and not any(self.unrecorded(task) for task in self.tasks)
        return done or bool(self.failure)

    def setting(self, dotted: str, default: Any) -> Any:
        value = look_up(self.settings, dotted)
        return default if value is None else value

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one key, ``validation.loss`` included, from the records that have it."""
        points = [(record["step"], look_up(record, key)) for record in self.records]
        return [s for s, value in points if value is not None], [float(v) for _, v in points if v is not None]

    def wait_share(self, kind: str) -> float | None:
        """Share of the run's wall time spent waiting for `kind`: the logged shares, weighted by their intervals."""
        weighted = total = previous = 0.0
        for record in self.records:
            if f"wait_{kind}" in record and "elapsed_seconds" in record:
                seconds = max(0.0, record["elapsed_seconds"] - previous)
                weighted, total = weighted + seconds * record[f"wait_{kind}"], total + seconds
                previous = record["elapsed_seconds"]
        return weighted / total if total else None


def read_run(run_uri: str) -> RunData:
    """Read what a run has written so far, at any URI.

    Raises:
        InputError: there is no config.yaml, so this is no run directory; or it cannot be read.
    """
    uri = run_directory(run_uri)
    settings = read_yaml_mapping(storage.join(uri, "config.yaml"))
    about = settings.pop("about", None) or {}
    probes, missed = read_probes(uri)
    return RunData(
        uri=uri,
        settings=settings,
        about=about,
        records=read_metrics(uri),
        restarts=list(_restarts(uri)),
        probes=probes,
        missed=missed,
        failure=str(read_failure(uri).get("reason", "")),
    )


def _restarts(uri: str) -> Iterator[Restart]:
    """A restarted run appends to the same file, from an earlier step or with another number of workers."""
    last: dict[str, Any] = {}
    for line in storage.read_from(storage.join(uri, "metrics.jsonl"), 0).decode("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or "loss" not in record:
            continue
        if last and (record["step"] <= last["step"] or record.get("workers") != last.get("workers")):
            yield Restart(before=last["step"], after=record["step"], workers=record.get("workers"))
        last = record


def read_probes(uri: str) -> tuple[list[Probe], list[Missed]]:
    """A run's results, and the probes that have none, each by task and step."""
    probes, missed = [], []
    for path in storage.list_dir(storage.join(uri, "probes")):
        match = PROBE_FILE.fullmatch(path.rsplit("/", 1)[-1])
        if match is None:
            continue
        task, step = match["task"], int(match["step"])
        record = storage.read_json(path)
        if record.get("status", "done") == "done":
            probes.append(_probe(task, step, record))
        else:
            missed.append(Missed(task, step, str(record["status"]), str(record.get("reason", ""))))
    return sorted(probes, key=lambda p: (p.task, p.step)), sorted(missed, key=lambda m: (m.task, m.step))


def _probe(task: str, step: int, record: Mapping[str, Any]) -> Probe:
    found = [key for key, value in record.items() if isinstance(value, Mapping) and "test_accuracy" in value]
    poolings = [*(p for p in POOLINGS if p in found), *(p for p in found if p not in POOLINGS)]
    baselines = record.get("baselines", {})
    return Probe(
        task=task,
        step=step,
        scores={pooling: score for pooling in poolings if (score := _score(record[pooling]))},
        baselines=Baselines(
            majority=_score(baselines.get("majority")),
            untrained=_scores(baselines.get("untrained", {})),
            start=_scores(baselines.get("start", {})),
            start_absent=str(look_up(baselines, "start.absent") or ""),
            tfidf=_score(baselines.get("tfidf")),
            tfidf_absent=str(look_up(baselines, "tfidf.absent") or ""),
        ),
        raw=record,
    )


def _scores(by_pooling: Mapping[str, Any]) -> dict[str, Score]:
    return {pooling: score for pooling, value in by_pooling.items() if (score := _score(value)) is not None}


def _score(value: Any) -> Score | None:
    """A score from its record, or from an accuracy alone."""
    if isinstance(value, Mapping) and "test_accuracy" in value:
        lo_hi = value.get("interval")
        return Score(
            accuracy=float(value["test_accuracy"]),
            interval=(float(lo_hi[0]), float(lo_hi[1])) if lo_hi else None,
            train_accuracy=value.get("train_accuracy"),
            macro_f1=value.get("macro_f1"),
            tuned_accuracy=value.get("tuned_accuracy"),
            tuned_c=value.get("tuned_c"),
            collapsed=str(value.get("collapsed", "")),
        )
    return Score(accuracy=float(value)) if isinstance(value, int | float) else None


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
