"""`raybert probe ...`: the probe service from the command line, and probes of single checkpoints."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from raybert import storage
from raybert.console import say
from raybert.errors import InputError

if TYPE_CHECKING:
    from raybert.probe.kind import ProbeTask
    from raybert.probe.service.queue import Records

app = typer.Typer(
    name="probe", help="Probe checkpoints, and inspect the probe service.", no_args_is_help=True, rich_markup_mode=None
)

RunUri = Annotated[str, typer.Argument(metavar="RUN", help="run directory, at any URI")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command(epilog="Example: raybert probe status")
def status(as_json: AsJson = False) -> None:
    """Show the cluster's probe services and their queues."""
    from raybert import cluster
    from raybert.probe import show
    from raybert.probe.service import client

    cluster.find()
    found = client.statuses()
    print(json.dumps(found)) if as_json else Console().print(show.status_table(found))


@app.command(epilog="Example: raybert probe results gs://bucket/runs/compact")
def results(run: RunUri, as_json: AsJson = False) -> None:
    """Show a run's probe results, and why any are missing."""
    from raybert.config import run_directory
    from raybert.probe import show
    from raybert.probe.service import queue

    found = queue.read_records(run_directory(run))
    records = list(found.good.values())
    print(json.dumps(records)) if as_json else Console().print(show.results_table(records))
    _say_left_out(found)


@app.command(epilog="Example: raybert probe wait gs://bucket/runs/compact --timeout 600")
def wait(
    run: RunUri, timeout: Annotated[float | None, typer.Option(help="fail after this many seconds")] = None
) -> None:
    """Wait until all of a run's queued probes are done.

    It watches the run directory as long as a probe service serves it. If none does, the service of RAY_ADDRESS or of
    this machine takes over.
    """
    from raybert.config import run_directory
    from raybert.probe.service import client, queue

    run_uri = run_directory(run)
    before = len(queue.waiting_steps(run_uri))
    columns = (TextColumn("probes"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task("probes", total=before)
        client.wait(
            run_uri,
            run_uri.rpartition("/")[0],
            timeout=timeout,
            progress=lambda left: bar.update(shown, completed=max(0, before - left)),
            take_over=False,
        )
        bar.update(shown, completed=before)
    _say_left_out(queue.read_records(run_uri))


@app.command(epilog="Example: raybert probe plan gs://bucket/runs/compact")
def plan(run: RunUri, as_json: AsJson = False) -> None:
    """Estimate what each of a run's probe tasks costs: texts, tokens, FLOPs, and time on this machine."""
    from raybert import config as configs
    from raybert.probe import plan as plans
    from raybert.train.check import check_shards, probe_tasks

    config, shards = check_shards(configs.load_run(run, []))
    threads = plans.threads_of(config.probe.cpus)
    options: dict[str, Any] = {"threads": threads, "gpu": config.probe.gpus > 0}
    options["begins_random"] = config.model.begins_random
    found = plans.costs(probe_tasks(config), config.model.bert(), shards.tokenizer(), **options)
    if as_json:
        print(json.dumps([asdict(cost) for cost in found]))
    else:
        Console().print(plans.table(found, threads=threads))


@app.command(epilog="Example: raybert probe run runs/compact/checkpoints/best --task bbc_news")
def run(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint at any URI, or a local transformers BERT directory")],
    task: Annotated[str, typer.Option(help="ag_news, bbc_news, sst2, NAME@DIRECTORY, or a task's YAML file")],
    as_json: AsJson = False,
) -> None:
    """Probe one checkpoint in this process."""
    from raybert.probe import show

    record = _probe(checkpoint, _load_task(task))
    print(json.dumps(record)) if as_json else Console().print(show.result_table(record))


@app.command(epilog="Example: raybert probe compare runs/a/checkpoints/best runs/b/checkpoints/best --task bbc_news")
def compare(
    a: Annotated[str, typer.Argument(help="checkpoint, transformers directory, or a run's probes/TASK-STEP.json")],
    b: Annotated[str, typer.Argument(help="the same; the result is B minus A")],
    task: Annotated[str, typer.Option(help="probe task; required unless both are probe records")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints on the same test texts, by a paired bootstrap for each pooling."""
    from raybert.probe import show
    from raybert.probe.compare import compare as compare_records

    sides, probe_task = [], None
    for uri in (a, b):
        if uri.endswith(".json"):
            sides.append(_record(uri))
        elif task:
            probe_task = probe_task or _load_task(task)
            sides.append(_probe(uri, probe_task))
        else:
            raise InputError(f"Name the task to probe {uri} with: --task NAME_OR_YAML.")
    found = compare_records(*sides)
    print(json.dumps(found)) if as_json else Console().print(show.comparison_table(found))


@app.command(epilog="Example: raybert probe stop")
def stop() -> None:
    """Stop the cluster's probe services. Queued probes wait for the next service."""
    from raybert import cluster
    from raybert.probe.service import client

    cluster.find()
    names = client.stop()
    print(f"stopped {', '.join(names)}" if names else "no probe service is running")


def _record(uri: str) -> dict[str, object]:
    from raybert.probe import record

    try:
        return record.parse(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise InputError(f"There is no probe record {uri}.") from error
    except ValueError as error:
        raise InputError(f"{uri} is damaged or not a probe record ({error}); probe the checkpoint again.") from error


def _say_left_out(found: "Records") -> None:
    for name, fault in found.damaged.items():
        say(f"ignored: probes/{name} cannot be read: {fault}", style="yellow")


def _load_task(spec: str) -> "ProbeTask":
    from raybert.probe.tasks import load_task, passed_over

    task = load_task(spec)
    if line := passed_over(task):
        say(line)
    return task


def _probe(checkpoint: str, task: "ProbeTask") -> dict[str, object]:
    from raybert import probe

    storage.absolute(checkpoint)  # refuses what is no path, before a bar is shown
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), console=console) as bar:
        shown = bar.add_task(f"reading {task.name}", total=None)

        def progress(share: float) -> None:
            bar.update(shown, description=f"encoding {task.name}", total=1.0, completed=share)

        record = probe.run(checkpoint, task, progress=progress)
    sys.stderr.flush()
    return record
