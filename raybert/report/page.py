"""The page: what is said of a run, put into report.html."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from raybert import storage
from raybert.probe import kinds
from raybert.probe.kind import Headline
from raybert.records import format_seconds
from raybert.report.beyond import against_start, verdict
from raybert.report.drawing import POOLING_TITLES
from raybert.report.overview import overview
from raybert.report.plots import Chart, learning_charts, machine_charts, probe_chart
from raybert.report.read import WAITS, Missed, Probe, RunData, percent, read_run

# Seconds after which the page of a run that is not over loads itself again.
REFRESH = 20


def write_report(run_uri: str) -> str:
    """Write RUN/report.html for a finished, running or interrupted run, and return its URI.

    Raises:
        InputError: `run_uri` is not a run directory.
    """
    run = read_run(run_uri)
    uri = storage.join(run.uri, "report.html")
    storage.write_bytes(uri, render(run).encode(errors="replace"))  # a name may hold what UTF-8 cannot
    return uri


def render(run: RunData) -> str:
    """The whole page; it refers to nothing outside itself. Every text of the run is escaped."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": percent, "svg": Markup, "pooling": lambda name: POOLING_TITLES.get(name, name)}
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        run=run,
        refresh=REFRESH,
        outcome=outcome(run),
        tiles=_tiles(run),
        learning=learning_charts(run),
        machine=machine_charts(run),
        tasks=[_task(run, task, index) for index, task in enumerate(run.tasks)],
        overview=overview(run),
        config=yaml.safe_dump(dict(run.settings), sort_keys=False, allow_unicode=True),
        versions=run.versions,
        manifest=run.about.get("manifest", ""),
    )


def outcome(run: RunData) -> str:
    """The gain over the start and the outcome of the run, a clause each."""
    verdicts = [said for task in run.tasks for probe in run.trained(task)[-1:] if (said := verdict(probe))]
    parts = [*verdicts, f"{run.steps_done:,} of {run.steps_planned:,} steps done"]
    steps, losses = run.series("validation.loss")
    if steps:
        parts.append(f"validation loss {losses[-1]:.4f} at step {steps[-1]:,}")
    else:
        parts.append("no validation yet")
    for task in run.tasks:
        best = run.best(task)
        if best is not None:
            probe, pooling = best
            results = sum(len(other.scores) for other in run.trained(task))
            parts.append(
                f"best of {results} probe results on {task}: {pooling} {probe.scores[pooling]} at step "
                f"{probe.step:,}; baselines: {_baselines(probe, pooling)}"
            )
    if not any(probe.step > 0 for probe in run.probes):
        parts.append("no probe result yet" + (" except the start's" if run.probes else ""))
    said = "; ".join(parts) + "."
    return " ".join([said[0].upper() + said[1:], *([run.no_best] if run.no_best else [])])


def _baselines(probe: Probe, pooling: str) -> str:
    baselines = probe.baselines
    found = {
        "untrained": baselines.untrained.get(pooling),
        "start": baselines.start.get(pooling),
        **{title: baselines.plain.get(name) for name, title in kinds.BASELINES.items()},
    }
    shown = [f"{name} {score}" for name, score in found.items() if score]
    shown += [f"no untrained encoder ({baselines.untrained_absent})"] if baselines.untrained_absent else []
    shown += [f"no {kinds.BASELINES[name]} ({why})" for name, why in baselines.absent.items()]
    return ", ".join(shown) or "no recorded baseline"


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    """The figures at the top: label, value, remark."""
    tiles = []
    for label, key in (("Validation MLM loss", "validation.mlm_loss"), ("Validation loss", "validation.loss")):
        steps, values = run.series(key)
        if steps:
            remark = f"from {values[0]:.3f} at step {steps[0]:,}" if len(steps) > 1 else f"at step {steps[0]:,}"
            tiles.append((label, f"{values[-1]:.3f}", remark))
    _, rates = run.series("tokens_per_second")
    if rates:
        tiles.append(("Tokens per second", f"{statistics.median(rates):,.0f}", "median, all workers"))
    _, shares = run.series("mfu")
    if shares:
        tiles.append(("MFU", percent(statistics.median(shares)), "median share of the measured peak"))
    waits = [run.wait_share(kind) for kind in WAITS if kind != "validation"]
    if any(wait is not None for wait in waits):
        total = sum(wait or 0.0 for wait in waits)
        tiles.append(("Waiting", percent(total), "of wall time: data, checkpoints, reports"))
    _, elapsed = run.series("elapsed_seconds")
    if elapsed:
        _, samples = run.series("samples")
        remark = f"{samples[-1]:,.0f} samples" if samples else ""
        tiles.append(("Training time", format_seconds(elapsed[-1]), remark))
    return tiles


@dataclass(frozen=True)
class TaskPart:
    """What the page shows of one probe task."""

    name: str
    chart: Chart | None
    poolings: Sequence[str]
    probes: Sequence[Probe]
    missed: Sequence[Missed]
    unrecorded: Sequence[int]
    confusion: "Confusion | None"
    beside: str
    gains: str
    against_start: str
    headline: Headline | None
    plain: Sequence[tuple[str, str]]  # baselines without an encoder that some result has, and their titles
    summary: str
    tuned: bool  # some result has C tuned
    collapsed: Sequence[str]  # sentences on the last result's vectors
    spread: str


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix with the classes' names: rows are the true classes, columns the predicted ones."""

    step: int
    pooling: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    def share(self, row: int, column: int) -> float:
        """Of the texts of class `row`, the share that was taken for class `column`."""
        return self.counts[row][column] / max(1, sum(self.counts[row]))


def _task(run: RunData, task: str, index: int) -> TaskPart:
    probes = run.of_task(task)
    confusion = _confusion(probes[-1]) if probes else None
    return TaskPart(
        name=task,
        chart=probe_chart(probes, f"probe-{index}", wide=confusion is None) if probes else None,
        poolings=list(dict.fromkeys(pooling for probe in probes for pooling in probe.scores)),
        probes=probes,
        missed=run.missed_of(task),
        unrecorded=run.unrecorded(task),
        confusion=confusion,
        beside=_baselines(probes[-1], confusion.pooling) if confusion else "",
        gains=_gains(probes[-1]) if probes else "",
        against_start=against_start(probes[-1]) if probes else "",
        headline=probes[-1].kind.headline if probes else None,
        plain=[
            (name, title)
            for name, title in kinds.BASELINES.items()
            if probes and (name in probes[-1].baselines.plain or name in probes[-1].baselines.absent)
        ],
        summary=probes[-1].kind.summary(probes[-1].raw) if probes else "",
        tuned=any("tuning" in probe.raw for probe in probes),
        collapsed=_collapsed(probes[-1]) if probes else [],
        spread=_spread(probes[-1]) if probes else "",
    )


def _collapsed(probe: Probe) -> list[str]:
    return [f"Step {probe.step:,}, {pooling}: {sentence}" for pooling, sentence in probe.collapsed.items()]


def _spread(probe: Probe) -> str:
    """Deviation and effective rank of each pooling's vectors, as far as the record has them."""
    parts = [
        f"{name} {entry['deviation']:.2g} and {entry['effective_rank']:.0f}"
        for name in probe.scores
        if "effective_rank" in (entry := probe.raw[name])
    ]
    return f"Deviation over texts and effective rank of the vectors: {', '.join(parts)}." if parts else ""


def _gains(probe: Probe) -> str:
    """How far each pooling stands from the same encoder untrained, and whether the intervals leave a doubt."""
    parts = []
    for pooling, score in probe.scores.items():
        before = probe.baselines.untrained.get(pooling)
        if before is None:
            continue
        (low, high), (low_before, high_before) = (one.interval or (one.value, one.value) for one in (score, before))
        apart = low > high_before or high < low_before
        change = 100 * (score.value - before.value)
        parts.append(f"{pooling} {change:+.1f} points ({'intervals do not overlap' if apart else 'intervals overlap'})")
    return f"Step {probe.step:,} compared with the same encoder untrained: {', '.join(parts)}." if parts else ""


def _confusion(probe: Probe) -> Confusion | None:
    """The first pooling's matrix, or the record's own."""
    for pooling in (*probe.scores, ""):
        holder: Mapping[str, Any] = probe.raw[pooling] if pooling else probe.raw
        counts = holder.get("confusion")
        if counts and probe.scores:
            names = probe.raw.get("labels") or []
            if len(names) != len(counts):
                names = list(range(len(counts)))
            return Confusion(probe.step, pooling or next(iter(probe.scores)), [str(name) for name in names], counts)
    return None
