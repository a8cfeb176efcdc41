"""The whole way in minutes on one machine: text to shards, training with probes beside it, a table and a page."""

import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from rich.console import Console

from raybert import cluster, storage
from raybert import config as configs
from raybert.config_sections import NEIGHBOURS
from raybert.data.text.prepare import prepare
from raybert.pretrain import drive
from raybert.probe.tasks import held_out
from raybert.report import live
from raybert.report.terminal import closing_table
from raybert.train.check import check, probe_tasks

CORPUS = "embedded://bbc_news"


def run_demo(task: str, directory: str, overrides: Sequence[str] = ()) -> str:
    """Prepare the embedded corpus, train `demo.yaml` on it under a name of its own, and return the report's URI.

    Args:
        task: the probe task, as `probe.tasks` names it.
        directory: where the shard set and the run directory go; each demo makes another run.
        overrides: settings of `demo.yaml` as ``key.sub=value``.

    Raises:
        InputError: the task is unknown or its texts cannot be read.
        RunFailed: training stopped before its last step.
    """
    console = Console()
    directory = storage.absolute(directory)
    own = [
        f"run.name={_next_name(directory)}",
        f"run.storage={directory}",
        f"probe.tasks={json.dumps([task], ensure_ascii=False)}",
    ]
    settings = configs.load(str(resources.files("raybert") / "demo.yaml"), [*own, *overrides])
    unseen = held_out(probe_tasks(settings))  # before a Ray is started
    console.print("[bold]1/4[/bold] starting Ray on this machine")
    cluster.connect()
    shards = storage.join(directory, "demo-shards")
    console.print("[bold]2/4[/bold] tokenising BBC News")
    seq_len = settings.model.bert().max_position_embeddings
    options: dict[str, Any] = {"validation_fraction": 0.05, "overwrite": True, "progress": True}
    # What the probe judges by must not be what was trained on.
    prepare([CORPUS], shards, seq_len=seq_len, held_out=unseen, **options)
    tasks = list(dict.fromkeys([*(settings.probe.tasks or []), NEIGHBOURS]))  # the one that has the shards alone
    settings = settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"shards": shards}),
            "probe": settings.probe.model_copy(update={"tasks": tasks}),
        }
    )
    run = check(settings)
    console.print(
        f"[bold]3/4[/bold] training on {run.shards.tokens('train'):,} tokens with {settings.train.workers} "
        "workers; a probe service evaluates the checkpoints meanwhile"
    )
    drive(run, live.bars(run.config, console), wait_for_probes=True)
    console.print("[bold]4/4[/bold] report")
    console.print(closing_table(run.uri))
    return storage.join(run.uri, "report.html")


def _next_name(directory: str) -> str:
    """demo-1, demo-2, ...: one more than the runs that are there."""
    names = (uri.rpartition("/")[2] for uri in storage.list_dir(directory))
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(r"demo-(\d+)", name))]
    return f"demo-{max(numbers, default=0) + 1}"
