"""The sweep's answer in a terminal."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from raybert.config_sections import VALIDATION_LOSS
from raybert.encode import POOLINGS
from raybert.probe.show import SHORT
from raybert.report.beyond import gains
from raybert.report.terminal import score_cell
from raybert.sweep.rates import best_rates, sentence
from raybert.sweep.space import SweepConfig
from raybert.sweep.summary import Outcome, collapses, ranked, sentence_of_best, tasks_of

# Of each table; the page and summary.json have all trials.
MOST_ROWS = 40


def summary_table(sweep: SweepConfig, outcomes: Sequence[Outcome]) -> RenderableType:
    """A row a trial, the best first, and the best rate of each size; then the probes beside their baselines."""
    ordered = ranked(sweep.metric, outcomes)
    tables = [_probes(task, [o for o in ordered if task in o.probes]) for task in tasks_of(outcomes)]
    return Group(_trials(sweep, ordered), *tables)


def _trials(sweep: SweepConfig, ordered: Sequence[Outcome]) -> Table:
    keys = list(sweep.space)
    table = Table("trial", *keys, "steps", "valid. loss", "", box=box.SIMPLE_HEAD, title=escape(sweep.name))
    table.caption_justify = "left"
    for o in ordered[:MOST_ROWS]:
        loss = "" if o.loss is None else f"{o.loss:.4f}"
        table.add_row(o.name, *(escape(_value(o.point[key])) for key in keys), f"{o.steps:,}", loss, o.status)
    lines = [sentence(rate) for rate in best_rates(ordered)]
    if sweep.metric != VALIDATION_LOSS and (line := sentence_of_best(sweep.metric, ordered)):
        lines.append(f"{line}.")
    lines += [f"{o.name} {o.status}: {o.reason}" for o in ordered if o.reason][:MOST_ROWS]
    if len(ordered) > MOST_ROWS:
        lines.append(f"{len(ordered) - MOST_ROWS} more trials are in summary.json.")
    table.caption = escape("\n".join(lines)) or None
    return table


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _probes(task: str, ordered: Sequence[Outcome]) -> Table:
    """The headlines of one task times 100, each with its 95 % interval; below, which vectors have collapsed."""
    headline = ordered[0].probes[task].kind.headline
    what = "% of test texts" if headline.share else headline.label
    table = Table("trial", "step", *POOLINGS, box=box.SIMPLE_HEAD, title=escape(f"{task}, {what}"))
    for o in ordered[:MOST_ROWS]:
        probe = o.probes[task]
        table.add_row(o.name, f"{probe.step:,}", *(score_cell(probe.scores.get(pooling)) for pooling in POOLINGS))
        for name, scores in (("untrained", probe.baselines.untrained), ("start", probe.baselines.start)):
            if scores or name == "untrained":
                table.add_row(f"  {name}", "", *(score_cell(scores.get(p)) for p in POOLINGS), style="dim")
        if gained := gains(probe):
            table.add_row("  gain", "", *(gained.get(pooling, "") for pooling in POOLINGS), style="dim")
    table.add_section()
    baselines = ordered[0].probes[task].baselines
    for name, score in baselines.plain.items():
        table.add_row(SHORT[name], "", *[score_cell(score)] * len(POOLINGS))
    table.caption_justify = "left"
    table.caption = escape("\n".join(collapses(task, ordered[:MOST_ROWS]))) or None
    return table
