"""Probe records as people read them: the log's block, and tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from raybert.encode import POOLINGS
from raybert.probe import kinds
from raybert.probe.kind import Headline
from raybert.records import format_seconds

Record = dict[str, Any]
NONE = "–"  # a figure that a record does not have
SHORT = kinds.BASELINES | {"majority": "majority"}  # for the head of a column


def format_block(record: Record) -> str:
    """The original process's lines for a run's log, then the other figures, as far as the record has them."""
    task = record.get("title", record["task"])
    head = f"Step {record['step']} {task} Embedding Evaluation:"
    if record["status"] != "done":
        return f"{head}\n  {record['status']}: {record['reason']}"
    kind = kinds.of_record(record)
    if kind is None:
        return f"{head}\n  this version does not know the kind {record['kind']}"
    if kind.name != kinds.DEFAULT:
        return "\n  ".join([head, *_lines(record, kind.headline)])
    pooler, start = _score(record, "pooler"), _score(record, "baselines", "start", "pooler")
    absent = _score(record, "baselines", "tfidf").get("absent")
    interval = "-".join(f"{bound:.4f}" for bound in pooler.get("interval") or []) or NONE
    others = ", ".join(f"{name} {_fraction(_score(record, name))}" for name in POOLINGS[1:])
    beside = ", ".join(
        [
            f"untrained {_fraction(_score(record, 'baselines', 'untrained', 'pooler'))}",
            *([f"start {_fraction(start)}"] if start else []),
            f"majority {_fraction(_score(record, 'baselines', 'majority'))}",
            f"TF-IDF {f'absent ({absent})' if absent else _fraction(_score(record, 'baselines', 'tfidf'))}",
        ]
    )
    lines = [
        head,
        f"Train Accuracy: {_fraction(pooler, 'train_accuracy')}",
        f"Test Accuracy: {_fraction(pooler)}",
        f"95 % interval {interval}; baselines: {beside}; other poolings: {others}",
    ]
    scores = {name: _score(record, name) for name in POOLINGS}
    if "tuned_accuracy" in pooler:
        figures = (
            f"{name} {_fraction(score, 'tuned_accuracy')} (C = {score.get('tuned_c', NONE)})"
            for name, score in scores.items()
        )
        lines.append(f"with C tuned: {', '.join(figures)}")
    beyond = {name: _score(record, "beyond_start", name) for name in POOLINGS}
    if all("difference" in row for row in beyond.values()):
        points = (f"{name} {_difference(row)[0]}" for name, row in beyond.items())
        lines.append(f"gain over the start, in points: {', '.join(points)}")
    lines += [f"{name}: {score['collapsed']}" for name, score in scores.items() if "collapsed" in score]
    return "\n  ".join(lines)


def _lines(record: Record, headline: Headline) -> list[str]:
    """Headline, baselines and start of a record of any kind."""
    names = kinds.poolings(record)

    def figures(scores: Record) -> str:
        found = ((name, headline.of(_score(scores, name))) for name in names)
        return ", ".join(f"{name} {value:.4f}" for name, value in found if value is not None) or NONE

    def with_interval(name: str) -> str:
        bounds = ", ".join(f"{bound:.4f}" for bound in record[name].get("interval") or [])
        return f"{name} {headline.of(record[name]):.4f}" + (f" [{bounds}]" if bounds else "")

    lines = [f"{headline.title}, 95 % interval: {', '.join(map(with_interval, names))}"]
    beside = []
    for which in ("untrained", "start"):
        scores = _score(record, "baselines", which)
        if scores or which == "untrained":
            why = scores.get("absent")
            beside.append(f"{which} absent ({why})" if why else f"{which} {figures(scores)}")
    for name, title in kinds.BASELINES.items():
        if entry := _score(record, "baselines", name):
            value = headline.of(entry)
            beside.append(f"{title} absent ({entry.get('absent')})" if value is None else f"{title} {value:.4f}")
    lines.append(f"baselines: {'; '.join(beside)}")
    beyond = ((name, _score(record, "beyond_start", name)) for name in names)
    points = [f"{name} {_difference(row)[0]}" for name, row in beyond if "difference" in row]
    lines += [f"gain over the start, in points: {', '.join(points)}"] if points else []
    for name in names:
        lines += [f"{name}: {warning}" for warning in record[name].get("warnings", [])]
        lines += [f"{name}: {record[name]['collapsed']}"] if "collapsed" in record[name] else []
    return lines


def _score(record: Record, *keys: str) -> Record:
    """A part of a record; empty where it has none."""
    part: Any = record
    for key in keys:
        part = part.get(key) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else {}


def _fraction(score: Record, key: str = "test_accuracy") -> str:
    value = score.get(key)
    return NONE if value is None else f"{value:.4f}"


def status_table(statuses: Sequence[Record]) -> Table:
    """A row for every run that a service has in hand."""
    table = Table("service", "run", "running", "waiting", box=box.SIMPLE_HEAD, title="probe services")
    for status in statuses:
        if "reason" in status:
            table.add_row(escape(status["name"]), escape(status["reason"]))
            continue
        counts = f"{status['done']} done, {status['failed']} failed, {status['skipped']} skipped"
        up = format_seconds(status["seconds_up"])
        table.add_row(escape(status["name"]), f"pid {status['pid']} on {status['node']}, up {up}, {counts}")
        for run in status["runs"]:
            running = ", ".join(f"{r['task']} step {r['step']:,} {_state(r)}" for r in run["running"])
            running = "; ".join(part for part in (running, run["trouble"]) if part)
            waiting = ", ".join(f"{step:,}" for step in run["waiting"])
            table.add_row("", escape(run["run"]), escape(running or "-"), waiting or "-")
    if not statuses:
        table.add_row("none", "the first run with probe tasks starts one")
    return table


def _state(probe: Record) -> str:
    if probe["seconds"] is not None:
        return f"({probe['seconds']:.0f} s)"
    return f"waits for {probe['waits_for']}" if probe["waits_for"] else "starts"


def results_table(records: Sequence[Record]) -> Table:
    """A row a record, and one below it with C tuned; the headline of the task's kind times 100 with its interval."""
    with_start = any("start" in record.get("baselines", {}) for record in records)
    plain = [name for name in SHORT if any(name in record.get("baselines", {}) for record in records)]
    baselines_head = ("untrained", *(["start"] if with_start else []), *(SHORT[name] for name in plain))
    table = Table("task", "step", *POOLINGS, *baselines_head, box=box.SIMPLE_HEAD)
    for record in sorted(records, key=lambda record: (record["task"], record["step"])):
        head = (escape(record["task"]), f"{record['step']:,}")
        if record["status"] != "done":
            table.add_row(*head, record["status"], escape(record["reason"]))
            continue
        kind = kinds.of_record(record)
        if kind is None:
            table.add_row(*head, "unknown", escape(f"this version does not know the kind {record['kind']}"))
            continue
        headline = kind.headline
        encoders = [_score(record, "baselines", "untrained")]
        encoders += [_score(record, "baselines", "start")] if with_start else []
        table.add_row(
            *head,
            *(_percent(_score(record, name), headline) for name in POOLINGS),
            *(_side_by_side(scores, headline.key) for scores in encoders),
            *(_plain(_score(record, "baselines", name), headline) for name in plain),
        )
        if "tuned_accuracy" in _score(record, POOLINGS[0]):
            table.add_row(
                "",
                "C tuned",
                *(_tuned(_score(record, name)) for name in POOLINGS),
                *(_side_by_side(scores, "tuned_accuracy") for scores in encoders),
                *(_tuned(_score(record, "baselines", name)) for name in plain),
            )
    return table


def _plain(score: Record, headline: Headline) -> str:
    return "absent" if "absent" in score else _percent(score, headline, interval=False)


def _side_by_side(scores: Record, key: str) -> str:
    """Of each pooling in per cent; empty where there are none."""
    values = [_score(scores, name).get(key) for name in POOLINGS]
    return "" if values == [None] * len(values) else " / ".join(NONE if v is None else f"{100 * v:.1f}" for v in values)


def _tuned(score: Record) -> str:
    """``71.2 (C 0.1)``, or nothing where C was not tuned."""
    return f"{100 * score['tuned_accuracy']:.1f}{_c(score)}" if score.get("tuned_accuracy") is not None else ""


def _c(score: Record) -> str:
    return f" (C {score['tuned_c']:g})" if score.get("tuned_c") is not None else ""


def result_table(record: Record) -> Table:
    """One record with its baselines, a row each."""
    kind = kinds.of_record(record)
    assert kind is not None
    headline = kind.headline
    if kind.name == kinds.DEFAULT:
        about = f"{record['n_train']:,} training and {record['n_test']:,} test texts"
        shown = "test % (95 % interval)"
    else:
        about = kind.summary(record)
        shown = f"{headline.label}{headline.unit} (95 % interval)"
    tuned = ["C tuned, test %"] if "tuning" in record else []
    title = f"{record.get('title', record['task'])}: {about}"
    table = Table("", shown, *tuned, *headline.others.values(), box=box.SIMPLE_HEAD, title=escape(title))
    baselines, names = record["baselines"], kinds.poolings(record)
    untrained = baselines["untrained"]
    groups = [
        [(name, record[name]) for name in names],
        [("untrained", untrained)] if "absent" in untrained else [(f"untrained {n}", untrained[n]) for n in names],
        [(title, baselines[name]) for name, title in kinds.BASELINES.items() if name in baselines],
    ]
    notes = [record["tuning"]] if tuned else []
    for group in groups:
        for name, score in group:
            if "absent" in score:
                table.add_row(name, "absent")
                notes.append(f"{name}: {score['absent']}")
                continue
            beside = (_other_figure(score, key) for key in headline.others)
            table.add_row(name, _percent(score, headline), *([_tuned(score)] if tuned else []), *beside)
            notes += [f"{name}: {warning}" for warning in score.get("warnings", [])]
            if "collapsed" in score:
                notes.append(f"{name}: {score['collapsed']}")
        table.add_section()
    table.caption = escape("\n".join(notes)) or None
    return table


def _other_figure(score: Record, key: str) -> str:
    """A figure beside the headline: an accuracy in per cent, others as they are."""
    value = score.get(key)
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" if key.endswith("accuracy") else f"{value:.3f}"


def comparison_table(found: Record) -> Table:
    """A row a pooling: both headlines, the difference with its interval, and p; then the same with C tuned."""
    kind = kinds.of_record(found)
    assert kind is not None
    what = "" if kind.name == kinds.DEFAULT else f"{kind.headline.label}, "
    title = f"{found['task']}, {what}{found['n_test']:,} {kind.counted}: B minus A, paired bootstrap"
    unit = " %" if kind.headline.share else ""
    table = Table("", f"A{unit}", f"B{unit}", "points (95 % interval)", "p", box=box.SIMPLE_HEAD, title=escape(title))
    names = [name for name, row in found.items() if isinstance(row, dict) and "difference" in row]
    for name in names:
        row = found[name]
        table.add_row(name, f"{100 * row['a']:.1f}", f"{100 * row['b']:.1f}", *_difference(row))
    for name in names:
        if tuned := found[name].get("tuned"):
            a, b = (f"{100 * tuned[side]:.1f} (C {tuned[f'{side}_c']:g})" for side in ("a", "b"))
            table.add_row(f"{name}, C tuned", a, b, *_difference(tuned))
    table.caption = escape(f"A: {found['a']}\nB: {found['b']}")
    return table


def _difference(row: Record) -> tuple[str, str]:
    p_value = row.get("p_value")
    shown = NONE if p_value is None else f"{p_value:.4f}"
    return times_100(row), shown


def times_100(difference: Mapping[str, Any], form: str = "{:+.1f} [{:+.1f}, {:+.1f}]") -> str:
    """``+3.1 [+1.2, +5.0]``, or in another form: a paired difference times 100 with its interval."""
    return form.format(*(100 * value for value in (difference["difference"], *difference["interval"])))


def percent_range(value: float, interval: Sequence[float] | None) -> str:
    """``71.2 68.9–73.4``: a headline times 100 with its interval, if there is one, in rich's markup."""
    text = f"{100 * value:.1f}"
    return f"{text} [dim]{100 * interval[0]:.1f}–{100 * interval[1]:.1f}[/dim]" if interval else text


def _percent(score: Record, headline: Headline, *, interval: bool = True) -> str:
    value = headline.of(score)
    return NONE if value is None else percent_range(value, score.get("interval") if interval else None)
