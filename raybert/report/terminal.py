"""What a person sees in the terminal when a run is over: one table, with every probe beside its baselines."""

import bisect
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from raybert.encode import POOLINGS
from raybert.probe.show import SHORT, percent_range
from raybert.report.beyond import verdict
from raybert.report.read import Probe, RunData, Score, read_run


def closing_table(run_uri: str, *, last: int | None = None) -> Table:
    """Losses, speed and probe results by step; a row for every validation, every probe (missed ones too), the end.

    Headlines are shown times 100, followed by their 95 % interval; below the baselines stand those with
    C tuned. With `last` the table is short: so many rows of steps and of tuned figures, and no sentence on them.

    Raises:
        InputError: `run_uri` is not a run directory.
    """
    return run_table(read_run(run_uri), last=last)


def run_table(run: RunData, *, last: int | None = None) -> Table:
    """`closing_table` of a run that was read before."""
    poolings = list(dict.fromkeys([*POOLINGS, *(pooling for probe in run.probes for pooling in probe.scores)]))
    several = len(run.tasks) > 1
    table = Table(
        title=escape(f"{run.name}: {run.steps_done:,} of {run.steps_planned:,} steps"),
        caption=escape(_caption(run, short=last is not None)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),  # 80 columns hold the three poolings of one task
    )
    for name in ("step", "train\nloss", "valid.\nMLM", "\ntokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for pooling in poolings:
        table.add_column(escape(f"{pooling}\n95 % interval"), justify="right", no_wrap=True)
    curves = [run.series(key) for key in ("loss", "validation.mlm_loss", "tokens_per_second")]
    tuned = {task: _tuned_rows(run.of_task(task)[-1], poolings) for task in run.tasks if run.of_task(task)}
    most = None if last is None else max(2, last - sum(map(len, tuned.values())))
    shown = _steps(run)[-most if most else None :]
    for step in shown:
        figures = [_at(step, curve, form) for curve, form in zip(curves, ("{:.3f}", "{:.3f}", "{:,.0f}"), strict=True)]
        # Several tasks have no room side by side, so each has a part of its own below.
        cells = _probe_cells(run, run.tasks[0], step, poolings) if run.tasks and not several else []
        table.add_row(f"{step:,}", *figures, *cells)
    for task in run.tasks:
        table.add_section()
        if several:
            table.add_row(*[""] * 4, f"[bold]{escape(task)}[/bold]")
            for step in shown:
                if step in _probed(run, task):
                    table.add_row(f"{step:,}", *[""] * 3, *_probe_cells(run, task, step, poolings))
        if probes := run.of_task(task):
            for name, scores in _baseline_rows(probes[-1], poolings):
                table.add_row(name, *[""] * 3, *(score_cell(score) for score in scores))
            if tuned[task] and not several:
                table.add_section()
            for name, scores in tuned[task]:
                table.add_row(name, *[""] * 3, *(tuned_cell(score) for score in scores))
    return table


def _steps(run: RunData) -> list[int]:
    steps = set(run.series("validation.loss")[0])
    for task in run.tasks:
        steps |= _probed(run, task)
    if run.records:
        steps.add(run.steps_done)
    return sorted(steps)


def _probed(run: RunData, task: str) -> set[int]:
    found = {p.step for p in run.of_task(task)} | {m.step for m in run.missed_of(task)}
    return found | set(run.unrecorded(task))


def _at(step: int, curve: tuple[list[int], list[float]], form: str) -> str:
    """The value logged at `step`; nothing is guessed for a step that was not logged."""
    steps, values = curve
    place = bisect.bisect_left(steps, step)
    return form.format(values[place]) if place < len(steps) and steps[place] == step else ""


def _probe_cells(run: RunData, task: str, step: int, poolings: Sequence[str]) -> list[str]:
    for probe in run.of_task(task):
        if probe.step == step:
            return [score_cell(probe.scores.get(pooling)) for pooling in poolings]
    status = [missed.status for missed in run.missed_of(task) if missed.step == step]
    if step in run.unrecorded(task):
        status = ["no record"]
    return [*(escape(word) for word in status), *[""] * len(poolings)][: len(poolings)]


def _baseline_rows(probe: Probe, poolings: Sequence[str]) -> list[tuple[str, list[Score | None]]]:
    baselines = probe.baselines
    rows: list[tuple[str, list[Score | None]]] = []
    for name, scores in (("untrained", baselines.untrained), ("start", baselines.start)):
        if scores or name == "untrained":
            rows.append((name, [scores.get(pooling) for pooling in poolings]))
    plain = {name: baselines.plain.get(name) for name in SHORT if name in {*baselines.plain, *baselines.absent}}
    return rows + [(SHORT[name], [score] * len(poolings)) for name, score in plain.items()]


def _tuned_rows(probe: Probe, poolings: Sequence[str]) -> list[tuple[str, list[Score | None]]]:
    """The last result and its baselines with C tuned, as far as the record has them."""
    rows = [("C tuned", [probe.scores.get(pooling) for pooling in poolings]), *_baseline_rows(probe, poolings)]
    return [(name, scores) for name, scores in rows if any(map(tuned_cell, scores))]


def tuned_cell(score: Score | None) -> str:
    """``71.2 C 0.1``: the accuracy with C chosen on held-out training texts, or nothing."""
    if score is None or score.tuned_accuracy is None:
        return ""
    return f"{100 * score.tuned_accuracy:.1f} C {score.tuned_c:g}"


def score_cell(score: Score | None) -> str:
    """``71.2 68.9–73.4``, or nothing."""
    return "" if score is None else percent_range(score.value, score.interval)


def _caption(run: RunData, *, short: bool) -> str:
    """Why a probe has no result, how many texts the others stand on, and what training added to the start."""
    lines = [f"ignored: {part}" for part in run.left_out]
    lines += [f"{m.task} at step {m.step:,} {m.status}: {m.reason}" for m in run.missed]
    for task in run.tasks:
        if probes := run.of_task(task):
            headline = probes[-1].kind.headline
            shown = "" if headline.share else f"{headline.label}; "
            lines.append(f"{task}: {shown}{probes[-1].kind.summary(probes[-1].raw)}")
            if not short:
                tuning = probes[-1].raw.get("tuning")
                lines += [f"C tuned: step {probes[-1].step:,} and its baselines, {tuning}"] if tuning else []
                lines += [said] if (said := verdict(probes[-1])) else []
            lines += [f"{pooling}: {sentence}" for pooling, sentence in probes[-1].collapsed.items()]
        if missing := run.unrecorded(task):
            lines.append(f"{task}: no record for step {', '.join(f'{step:,}' for step in missing)}")
    lines = lines or ["no probe result"]
    return "\n".join([*lines, *([run.no_best] if run.no_best else [])])
