"""Probe records as people read them: the log's block, and tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from raybert.encode import POOLINGS
from raybert.records import format_seconds

Record = dict[str, Any]
NONE = "–"  # a figure that a record does not have


def format_block(record: Record) -> str:
    """The original process's lines for a run's log, then what stands beside them, as far as the record has it."""
    task = record.get("title", record["task"])
    head = f"Step {record['step']} {task} Embedding Evaluation:"
    if record["status"] != "done":
        return f"{head}\n  {record['status']}: {record['reason']}"
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
        f"95 % interval {interval}; beside it {beside}; other poolings: {others}",
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
        lines.append(f"beyond the start, in points: {', '.join(points)}")
    lines += [f"{name}: {score['collapsed']}" for name, score in scores.items() if "collapsed" in score]
    return "\n  ".join(lines)


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
    """A row a record, and one below it with C tuned; in per cent of the test texts with their 95 % interval."""
    with_start = any("start" in record.get("baselines", {}) for record in records)
    baselines_head = ("untrained", *(["start"] if with_start else []), "majority", "TF-IDF")
    table = Table("task", "step", *POOLINGS, *baselines_head, box=box.SIMPLE_HEAD)
    for record in sorted(records, key=lambda record: (record["task"], record["step"])):
        head = (escape(record["task"]), f"{record['step']:,}")
        if record["status"] != "done":
            table.add_row(*head, record["status"], escape(record["reason"]))
            continue
        encoders = [_score(record, "baselines", "untrained")]
        encoders += [_score(record, "baselines", "start")] if with_start else []
        tfidf = _score(record, "baselines", "tfidf")
        table.add_row(
            *head,
            *(_percent(_score(record, name)) for name in POOLINGS),
            *(_side_by_side(scores, "test_accuracy") for scores in encoders),
            _percent(_score(record, "baselines", "majority"), interval=False),
            "absent" if "absent" in tfidf else _percent(tfidf, interval=False),
        )
        if "tuned_accuracy" in _score(record, POOLINGS[0]):
            table.add_row(
                "",
                "C tuned",
                *(_tuned(_score(record, name)) for name in POOLINGS),
                *(_side_by_side(scores, "tuned_accuracy") for scores in encoders),
                "",
                _tuned(tfidf),
            )
    return table


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
    title = f"{record.get('title', record['task'])}: {record['n_train']:,} training and {record['n_test']:,} test texts"
    tuned = ["C tuned, test %"] if "tuning" in record else []
    table = Table("", "train %", "test % (95 % interval)", *tuned, "macro F1", box=box.SIMPLE_HEAD, title=escape(title))
    rows = [(name, record[name]) for name in POOLINGS]
    rows += [(f"untrained {name}", record["baselines"]["untrained"][name]) for name in POOLINGS]
    rows += [("majority class", record["baselines"]["majority"]), ("TF-IDF", record["baselines"]["tfidf"])]
    notes = [record["tuning"]] if tuned else []
    for index, (name, score) in enumerate(rows):
        if "absent" in score:
            table.add_row(name, "absent")
            notes.append(f"{name}: {score['absent']}")
            continue
        train, f1 = f"{100 * score['train_accuracy']:.1f}", f"{score['macro_f1']:.3f}"
        last_of_group = index % len(POOLINGS) == len(POOLINGS) - 1
        table.add_row(name, train, _percent(score), *([_tuned(score)] if tuned else []), f1, end_section=last_of_group)
        notes += [f"{name}: {warning}" for warning in score["warnings"]]
        if "collapsed" in score:
            notes.append(f"{name}: {score['collapsed']}")
    table.caption = escape("\n".join(notes)) or None
    return table


def comparison_table(found: Record) -> Table:
    """A row a pooling: both accuracies, the difference with its interval, and p; then the same with C tuned."""
    title = f"{found['task']}, {found['n_test']:,} test texts: B minus A, paired bootstrap"
    table = Table("", "A %", "B %", "points (95 % interval)", "p", box=box.SIMPLE_HEAD, title=escape(title))
    for name in POOLINGS:
        row = found[name]
        table.add_row(name, f"{100 * row['a']:.1f}", f"{100 * row['b']:.1f}", *_difference(row))
    for name in POOLINGS:
        if tuned := found[name].get("tuned"):
            a, b = (f"{100 * tuned[side]:.1f} (C {tuned[f'{side}_c']:g})" for side in ("a", "b"))
            table.add_row(f"{name}, C tuned", a, b, *_difference(tuned))
    table.caption = escape(f"A: {found['a']}\nB: {found['b']}")
    return table


def _difference(row: Record) -> tuple[str, str]:
    low, high = row["interval"]
    return f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", f"{row['p_value']:.4f}"


def percent_range(accuracy: float, interval: Sequence[float] | None) -> str:
    """``71.2 68.9–73.4``: an accuracy in per cent with its interval, if there is one, in rich's markup."""
    text = f"{100 * accuracy:.1f}"
    return f"{text} [dim]{100 * interval[0]:.1f}–{100 * interval[1]:.1f}[/dim]" if interval else text


def _percent(score: Record, *, interval: bool = True) -> str:
    accuracy = score.get("test_accuracy")
    return NONE if accuracy is None else percent_range(accuracy, score.get("interval") if interval else None)
