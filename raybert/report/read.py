"""A run directory, read into plain values. Everything that is shown of a run comes from here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raybert import storage
from raybert.config import look_up, read_yaml_mapping, run_directory
from raybert.config_sections import VALIDATION_LOSS
from raybert.errors import InputError
from raybert.probe import kinds, metrics
from raybert.probe.kind import Headline, Kind
from raybert.probe.service import queue
from raybert.probe.service.queue import Records
from raybert.records import LARGEST, METRICS, Lines, by_step, is_number, read_failure, read_lines

T = TypeVar("T", int, str, list[Any])
CONFIG = "config.yaml"
WAITS = ("data", "checkpoint", "report", "validation")


@dataclass(frozen=True)
class Score:
    """One result on a probe task: the headline of the task's kind, in 0..1 or -1..1; None where the record does not
    say."""

    value: float
    interval: tuple[float, float] | None = None
    beside: Mapping[str, float] = field(default_factory=dict)  # the kind's other figures
    tuned_accuracy: float | None = None
    tuned_c: float | None = None
    collapsed: str = ""  # a sentence, of vectors that have
    unit: str = " %"

    def __str__(self) -> str:
        """``71.2 % [68.9, 73.4]``: the headline times 100 with its interval, as far as the record has one."""
        text = f"{100 * self.value:.1f}{self.unit}"
        return f"{text} [{100 * self.interval[0]:.1f}, {100 * self.interval[1]:.1f}]" if self.interval else text


@dataclass(frozen=True)
class Baselines:
    """What a probe's headline is to be compared with: no training, the run's start, no encoder."""

    untrained: Mapping[str, Score] = field(default_factory=dict)
    untrained_absent: str = ""  # why there is none
    start: Mapping[str, Score] = field(default_factory=dict)
    start_absent: str = ""  # why there is none
    plain: Mapping[str, Score] = field(default_factory=dict)  # without an encoder, by the names of kinds.BASELINES
    absent: Mapping[str, str] = field(default_factory=dict)  # why one of those is missing


@dataclass(frozen=True)
class Probe:
    """The result of one task at one step. `scores` has an entry a pooling; `raw` is the record itself."""

    task: str
    step: int
    kind: Kind
    scores: Mapping[str, Score]
    baselines: Baselines
    raw: Mapping[str, Any]

    @property
    def collapsed(self) -> dict[str, str]:
        """A sentence for each pooling whose vectors have collapsed."""
        return {pooling: score.collapsed for pooling, score in self.scores.items() if score.collapsed}


@dataclass(frozen=True)
class Missed:
    """A probe that has no result, and why."""

    task: str
    step: int
    status: str
    reason: str


@dataclass(frozen=True)
class Restart:
    """The log continues after step `before` with step `after`."""

    before: int
    after: int
    workers: int | None


@dataclass(frozen=True)
class LeftOut:
    """A file of the run's directory that cannot be read in full, and why."""

    file: str
    fault: str

    def __str__(self) -> str:
        return f"{self.file} {self.fault}"


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
    left_out: Sequence[LeftOut] = ()

    @property
    def name(self) -> str:
        return self.setting("run.name", storage.absolute(self.uri).rsplit("/", 1)[-1])

    @property
    def cadences(self) -> int:
        """The step behind which the present settings say what is due; before it there may have been others."""
        return _of_kind(self.about.get("cadences"), 0)

    @property
    def seq_len(self) -> int:
        """Tokens of a sample; 0 where the run does not say."""
        return _of_kind(self.about.get("seq_len"), 0)

    @property
    def versions(self) -> Mapping[str, Any]:
        """Of the packages that the run was started with, by name; empty where it does not say."""
        found = self.about.get("versions")
        return found if isinstance(found, dict) else {}

    @property
    def steps_done(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def steps_planned(self) -> int:
        return self.setting("train.steps", self.steps_done)

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
        """The trained probe and the pooling of the highest headline."""
        pairs = [(probe, pooling) for probe in self.trained(task) for pooling in probe.scores]
        return max(pairs, key=lambda pair: pair[0].scores[pair[1]].value, default=None)

    def unrecorded(self, task: str) -> list[int]:
        """Steps that were due for a probe, by the present settings, and have neither result nor reason."""
        every = self.setting("every.probe", 0)
        if not every:
            return []
        last = min(self.steps_done, self.steps_planned)
        due = {step for step in range(every, last + 1, every) if step > self.cadences}
        if self.steps_done >= self.steps_planned:
            due.add(self.steps_planned)
        return sorted(due - {p.step for p in self.of_task(task)} - {m.step for m in self.missed_of(task)})

    @property
    def over(self) -> bool:
        """All steps done and each probe recorded, or failed: nothing will be added."""
        done = self.steps_done >= self.steps_planned and not any(self.unrecorded(task) for task in self.tasks)
        return done or bool(self.failure)

    @property
    def no_best(self) -> str:
        """A sentence where a probe should have said which weights are the best, and the run is over without that."""
        metric = self.setting("checkpoint.best", VALIDATION_LOSS)
        if metric == VALIDATION_LOSS or not self.over:
            return ""
        if any(probe.step > 0 and metrics.value(metric, probe.raw) is not None for probe in self.probes):
            return ""
        missed = [one for one in self.missed if one.step > 0 and metrics.of_task(metric, one.task)]
        why = f": the run ended at step {self.steps_done:,} of {self.steps_planned:,}" if self.failure else ""
        if missed:
            last = missed[-1]
            why = f": {last.task} {last.status} at step {last.step:,} ({last.reason.rstrip('.')})"
        return f"No checkpoint has a value for {metric}, so none is marked best{why}."

    @property
    def suite(self) -> tuple[str, list[str]]:
        """The suite's name and the names of its tasks; empty where the run has none."""
        found = self.about.get("suite")
        if not isinstance(found, dict):
            return "", []
        return str(found.get("name", "")), [str(task) for task in _of_kind(found.get("tasks"), [])]

    def setting(self, dotted: str, default: T) -> T:
        """A value of the config; the default where it has none, or one of another type (in an edited file)."""
        return _of_kind(look_up(self.settings, dotted), default)

    def shown(self, dotted: str) -> str:
        """A value of the config as text; a question mark where it has none."""
        value = look_up(self.settings, dotted)
        return "?" if value is None else str(value)

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


def _of_kind(value: Any, default: T) -> T:
    """The value where it is of the default's type; a number also has to be one of steps or the like."""
    if type(value) is not type(default) or (isinstance(value, int) and not 0 <= value <= LARGEST):
        return default
    return value


def read_run(run_uri: str) -> RunData:
    """Read what a run has written so far, at any URI. What cannot be read is left out and named.

    Raises:
        InputError: there is no config.yaml, so this is not a run directory.
    """
    uri = run_directory(run_uri)
    left_out = []
    try:
        settings, about = read_settings(uri)
    except InputError as error:
        settings, about = {}, {}
        left_out.append(LeftOut(CONFIG, f"cannot be read: {error}"))
    lines, found = read_lines(uri), queue.read_records(uri)
    probes, missed = by_task(found)
    return RunData(
        uri=uri,
        settings=settings,
        about=about,
        records=by_step(lines.records),
        restarts=list(_restarts(lines.records)),
        probes=probes,
        missed=missed,
        failure=read_failure(uri).get("reason", ""),
        left_out=[*left_out, *damage(lines, found)],
    )


def read_settings(uri: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in a run's config.yaml, and what it tells about the run beside them.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    settings = read_yaml_mapping(storage.join(uri, CONFIG))
    if not settings:  # a power loss leaves an empty file
        raise InputError(f"{storage.join(uri, CONFIG)} is empty.")
    about = settings.pop("about", None)
    return settings, about if isinstance(about, dict) else {}


def damage(lines: Lines, found: Records) -> list[LeftOut]:
    """What cannot be read in a run's log and probe records."""
    left_out = []
    if lines.damaged:
        total = len(lines.records) + lines.damaged
        left_out.append(LeftOut(METRICS, f"has unreadable lines ({lines.damaged:,} of {total:,})"))
    left_out += [LeftOut(f"probes/{name}", f"cannot be read: {fault}") for name, fault in found.damaged.items()]
    return left_out


def _restarts(records: Sequence[Mapping[str, Any]]) -> Iterator[Restart]:
    """A restarted run appends to the same file, from an earlier step or with another number of workers."""
    last: Mapping[str, Any] = {}
    for record in records:
        if "loss" not in record:
            continue
        if last and (record["step"] <= last["step"] or record.get("workers") != last.get("workers")):
            yield Restart(before=last["step"], after=record["step"], workers=record.get("workers"))
        last = record


def by_task(found: Records) -> tuple[list[Probe], list[Missed]]:
    """A run's results, and the probes that have none, each by task and step."""
    probes, missed = [], []
    for record in found.good.values():
        task, step = record["task"], record["step"]
        kind = kinds.of_record(record)
        if kind is None:
            missed.append(Missed(task, step, "unknown", f"this version does not know the kind {record['kind']}"))
        elif record["status"] == "done":
            probes.append(_probe(task, step, kind, record))
        else:
            missed.append(Missed(task, step, record["status"], record["reason"]))
    return sorted(probes, key=lambda p: (p.task, p.step)), sorted(missed, key=lambda m: (m.task, m.step))


def _probe(task: str, step: int, kind: Kind, record: Mapping[str, Any]) -> Probe:
    of, baselines = kind.headline, record.get("baselines") or {}
    plain = {name: baselines.get(name) for name in kinds.BASELINES}
    return Probe(
        task=task,
        step=step,
        kind=kind,
        scores={name: score for name in kinds.poolings(record) if (score := _score(record[name], of))},
        baselines=Baselines(
            untrained=_scores(baselines.get("untrained", {}), of),
            untrained_absent=str(look_up(baselines, "untrained.absent") or ""),
            start=_scores(baselines.get("start", {}), of),
            start_absent=str(look_up(baselines, "start.absent") or ""),
            plain=_scores(plain, of),
            absent={name: str(why) for name in plain if (why := look_up(baselines, f"{name}.absent"))},
        ),
        raw=record,
    )


def _scores(by_name: Mapping[str, Any], of: Headline) -> dict[str, Score]:
    return {name: score for name, value in by_name.items() if (score := _score(value, of)) is not None}


def _score(value: Any, of: Headline) -> Score | None:
    """A score from its record, or from a headline alone."""
    headline = of.of(value)
    if headline is not None:
        lo_hi = value.get("interval")
        return Score(
            value=headline,
            interval=(float(lo_hi[0]), float(lo_hi[1])) if lo_hi else None,
            beside={key: float(value[key]) for key in of.others if is_number(value.get(key))},
            tuned_accuracy=value.get("tuned_accuracy"),
            tuned_c=value.get("tuned_c"),
            collapsed=str(value.get("collapsed", "")),
            unit=of.unit,
        )
    return Score(value=float(value), unit=of.unit) if is_number(value) else None


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
