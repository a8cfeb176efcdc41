"""What a person sees of a run while it goes on: bars and an ETA in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raybert import storage
from raybert.config import Config, run_directory
from raybert.errors import RunFailed
from raybert.model.objective import TITLES
from raybert.probe.service import queue
from raybert.probe.show import format_block
from raybert.records import format_line, format_seconds, read_end, read_failure, read_metrics
from raybert.report.drawing import bin_means
from raybert.report.read import WAITS, read_run
from raybert.report.terminal import closing_table, run_table
from raybert.report.watch import RunReader, Subscriber
from raybert.storage.lease import Onlooker

Record = dict[str, Any]
BLOCKS = "▁▂▃▄▅▆▇█"
SILENT_MINUTES = 5.0
PROBE_MINUTES = 30.0  # without a probe, of a large model on a busy machine
# Seconds without a driver after which a run counts as left: a job that is tried again, or submitted, starts meanwhile.
GRACE = 60.0
TABLE_ROWS = 6  # with the curves above they fill a terminal of 24 lines


@contextmanager
def showing(config: Config, console: Console) -> Iterator[Subscriber]:
    """A subscriber that shows the run's news, the way the console allows."""
    if console.is_terminal:
        with bars(config, console) as subscriber:
            yield subscriber
    else:
        yield lines(config)


def lines(config: Config) -> Subscriber:
    """Prints a line for each record and each fault, and a block for each probe."""

    def on_record(record: Record) -> None:
        print(format_line(record, config.train.steps), flush=True)

    def on_fault(fault: Record) -> None:
        print(f"fault: {fault['text']}", flush=True)

    def on_probe(record: Record) -> None:
        print(format_block(record), flush=True)

    return Subscriber("terminal", on_record=on_record, on_fault=on_fault, on_probe=on_probe)


@contextmanager
def bars(config: Config, console: Console) -> Iterator[Subscriber]:
    """A bar for the steps and one for the probes; above them validations and probes as they come."""
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as shown:
        done, due = _last_logged(config.run_uri), probe_count(config)
        training = shown.add_task("training", total=config.train.steps, completed=done, note="starting the workers")
        probed = len(queue.records(config.run_uri))
        probes = shown.add_task("probes", total=due, completed=probed, note="", visible=due > 0)

        def on_record(record: Record) -> None:
            if "loss" in record:
                figures = {"mlm_loss": "mlm loss {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
                note = ", ".join(form.format(record[key]) for key, form in figures.items() if key in record)
                shown.update(training, completed=record["step"], note=note)
            if (found := record.get("validation", {}).get("mlm_loss")) is not None:
                shown.print(f"Step {record['step']} validation MLM loss {found:.4f}", highlight=False)

        def on_probe(record: Record) -> None:
            shown.update(probes, advance=1)
            shown.print(format_block(record), highlight=False, markup=False)

        def on_fault(fault: Record) -> None:
            shown.print(f"fault: {fault['text']}", highlight=False, markup=False)

        yield Subscriber("terminal", on_record=on_record, on_fault=on_fault, on_probe=on_probe)


def _last_logged(run_uri: str) -> int:
    """The step that an earlier start of the run has come to."""
    return max((record["step"] for record in read_metrics(run_uri)), default=0)


def probe_count(config: Config) -> int:
    """Probe results that are due over the whole run, those of its start among them where it has some."""
    steps, every = config.train.steps, config.every.probe
    start = 0 if config.model.begins_random else 1
    tasks = 1 if config.probe.tasks is None else len(config.probe.tasks)
    return (-(-steps // every) + start) * tasks if every else 0


# -- raybert watch ------------------------------------------------------------------------------------------------


def watch(run: str, *, once: bool = False) -> None:
    """Show a run until it is over, or until no driver is left: from its directory alone, so from any machine,
    and after it as well.

    Args:
        once: show its present state and return.

    Raises:
        InputError: `run` is not a run directory.
        RunFailed: the run failed, or stopped before its last step.
    """
    run_uri, console = run_directory(run), Console()
    state = State(run_uri)
    if once:
        state.refresh()
        console.print(view(state, console.width))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as screen:
            _until_over(state, lambda: screen.update(view(state, console.width), refresh=True))
    else:
        shown, told = 0, False

        def print_news() -> None:
            nonlocal shown, told
            for record in state.records[shown:]:
                print(format_line(record, state.steps), flush=True)
            shown = len(state.records)
            if (state.silence or state.left) and not told:
                print(state.silence or state.left, flush=True)
            told = bool(state.silence or state.left)

        _until_over(state, print_news)
        console.print(closing_table(run_uri))
    if state.failure or (state.left and not once):
        raise RunFailed(state.failure or state.left)


def _until_over(state: "State", show: Callable[[], None]) -> None:
    interval = 10.0 if storage.is_remote(state.uri) else 1.0
    while True:
        state.refresh()
        show()
        if state.over:
            return
        time.sleep(interval)


class State:
    """A run as far as it has come. `refresh` reads what is new."""

    def __init__(self, run_uri: str) -> None:
        found = read_run(run_uri)
        self.uri, self.name, self.steps = run_uri, found.name, found.steps_planned
        self.records: list[Record] = []
        self.table: Table | None = None
        self.waiting: list[int] = []
        self.failure = ""
        self._stale = True  # the table: it is made anew for validations, probes and damaged lines alone
        self.left_out: list[str] = []
        self.faults: list[Record] = []
        self._onlooker, self._driven = Onlooker(run_uri, 60 * SILENT_MINUTES), True
        self._undriven_since = time.monotonic()
        self._end: Record = {}
        self._news = time.monotonic()
        self._reader = RunReader(run_uri)

    def _take(self, kind: str, value: Record) -> None:
        self._news = time.monotonic()
        if kind == "record":
            self.records.append(value)
        elif kind == "fault":
            self.faults.append(value)
        self._stale |= kind == "probe" or "validation" in value

    def refresh(self) -> None:
        # First: what the driver wrote before it ended is read after its end is known.
        self._driven = self._onlooker.driven()
        if self._driven:
            self._undriven_since = time.monotonic()
        damaged = self._reader.damaged_lines
        for kind, value in self._reader.read():
            self._take(kind, value)
        if self._stale or self._reader.damaged_lines != damaged:
            found, self._stale = read_run(self.uri), not self.records
            self.table = run_table(found, last=TABLE_ROWS) if self.records else None
            self.left_out = [str(part) for part in found.left_out]
        self.waiting = queue.waiting_steps(self.uri)
        self.failure = read_failure(self.uri).get("reason", "")
        self._end = {} if self._driven else read_end(self.uri)

    @property
    def damaged_faults(self) -> list[str]:
        return [f"faults/{name} cannot be read: {fault}" for name, fault in self._reader.damaged_faults.items()]

    @property
    def trained(self) -> list[Record]:
        return [record for record in self.records if "loss" in record]

    @property
    def step(self) -> int:
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def silence(self) -> str:
        """A sentence if there was no progress for long although the run has a driver."""
        minutes = (time.monotonic() - self._news) / 60
        times = [record["elapsed_seconds"] for record in self.trained[-2:] if "elapsed_seconds" in record]
        usual = (times[1] - times[0]) / 60 if len(times) == 2 else 0.0  # between two log lines
        if minutes < max(SILENT_MINUTES, 3 * usual) or self.step >= self.steps or not self._driven:
            return ""
        return f"no progress for {minutes:.0f} minutes: the run is waiting for nodes or storage"

    @property
    def left(self) -> str:
        """A sentence when the run has no driver any more, and still has steps to do or probes that no service runs."""
        if self._driven:
            return ""
        if self.step >= self.steps:  # where the probe service outlives the job, probes still come
            quiet = self.waiting and time.monotonic() - self._news >= 60 * PROBE_MINUTES
            return f"training of {self.uri} finished; no service is running its pending probes" if quiet else ""
        where = f"{self.uri} is not running: it stopped at step {self.step:,} of {self.steps:,}"
        if self._end:
            return f"{where}, {self._end['status']} by its sweep"
        return f"{where}; rerun the same command to resume"

    @property
    def over(self) -> bool:
        """All steps done and probed, failed, or left by its driver."""
        left = self.left and (self._end or time.monotonic() - self._undriven_since >= GRACE)
        return bool(self.failure or left) or (self.step >= self.steps and not self.waiting)


def view(state: State, width: int) -> RenderableType:
    """The picture of one moment: progress, losses, speed, waits and probes."""
    parts: list[RenderableType] = [_head(state)]
    trained = state.trained
    if trained:
        wide = max(10, min(100, width - 44))
        curves = Table.grid(padding=(0, 1))
        for name, key, form in (
            ("loss", "loss", "{:.4f}"),
            *((title, f"{name}_loss", "{:.4f}") for name, title in TITLES.items()),
            ("tokens/s", "tokens_per_second", "{:,.0f}"),
        ):
            if values := [record[key] for record in trained if key in record]:
                curves.add_row(name, f"[bold]{form.format(values[-1])}[/bold]", sparkline(values, wide))
        parts += [curves, _facts(state, trained[-1])]
    else:
        parts.append(Text("no step logged yet"))
    if state.table is not None:
        parts.append(state.table)
    else:
        parts += [Text(f"ignored: {part}", style="yellow") for part in state.left_out]
    parts += [Text(f"fault: {fault['text']}", style="yellow") for fault in state.faults[-3:]]
    parts += [Text(f"ignored: {part}", style="yellow") for part in state.damaged_faults]
    if state.waiting:
        parts.append(Text(f"waiting for a probe: {', '.join(f'step {step:,}' for step in state.waiting)}"))
    if state.silence:
        parts.append(Text(state.silence, style="yellow"))
    if state.left:
        parts.append(Text(state.left, style="yellow"))
    if state.failure:
        parts.append(Text(f"failed: {state.failure}", style="red"))
    return Group(*parts)


def _head(state: State) -> RenderableType:
    left = state.trained[-1].get("eta_seconds") if state.trained else None
    when = "done" if state.step >= state.steps else f"{format_seconds(left)} left" if left is not None else ""
    head = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=state.steps, completed=state.step, width=30)
    head.add_row(f"[bold]{escape(state.name)}[/bold]", bar, f"step {state.step:,} of {state.steps:,}", when)
    return head


def _facts(state: State, last: Record) -> RenderableType:
    waits = [f"{kind} {100 * last[f'wait_{kind}']:.1f} %" for kind in WAITS if f"wait_{kind}" in last]
    table = Table.grid(padding=(0, 1))
    for title, figures in (
        ("lr, gradient norm", {"lr": "{:.2e}", "grad_norm": "{:.2f}"}),
        ("speed", {"mfu": "{:.1%} of the measured peak", "workers": "{} workers"}),
    ):
        table.add_row(title, ", ".join(form.format(last[key]) for key, form in figures.items() if key in last))
    table.add_row("waiting for", ", ".join(waits))
    validations = [record for record in state.records if "loss" in record.get("validation", {})]
    if validations:
        found = validations[-1]["validation"]
        parts = [f"{name} {found[f'{name}_loss']:.4f}" for name in TITLES if f"{name}_loss" in found]
        text = f"{found['loss']:.4f} ({', '.join(parts)})"
        table.add_row("validation loss", f"{text} at step {validations[-1]['step']:,}")
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """The curve in `width` characters at most, from the lowest value to the highest."""
    means = bin_means(range(len(values)), np.asarray(values, dtype=float)[None], bins=width)[1][0]
    low, high = float(means.min()), float(means.max())
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in means)
