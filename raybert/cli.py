"""The command line: `raybert COMMAND`. Every command is a thin layer over the library; start reading here.

prepare -> raybert.data.text.prepare   pretrain -> raybert.pretrain    sweep          -> raybert.sweep.run
report  -> raybert.report              watch    -> raybert.report.live verify, doctor -> raybert.verify, doctor
embed, export, import -> raybert.cli_model   tokenizer -> raybert.cli_tokenizer   probe -> raybert.cli_probe
submit  -> raybert.submit              bench    -> raybert.bench       demo           -> raybert.demo
"""

import logging
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from raybert import storage
from raybert.cli_model import app as model_app
from raybert.cli_probe import app as probe_app
from raybert.cli_tokenizer import app as tokenizer_app
from raybert.console import Commands, say
from raybert.errors import InputError, RunFailed

app = typer.Typer(
    name="raybert",
    cls=Commands,
    help="Pre-train a BERT encoder on Ray and watch its embeddings get better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # frames around everything would take more lines
)
app.add_typer(model_app)  # without a name its commands are raybert's own
app.add_typer(probe_app)
app.add_typer(tokenizer_app)


def _complete_setting(incomplete: str) -> list[tuple[str, str]]:
    """The settings that begin with what was typed, each with its meaning, for the shell."""
    from raybert.config import Config, meanings

    return [(f"{key}=", meaning) for key, meaning in meanings(Config).items() if key.startswith(incomplete)]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="estimate time and memory from three measured steps; train nothing")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="settings as key.sub=value", show_default=False, autocompletion=_complete_setting),
]


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 failed, 2 refused before starting, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING)
    sys.exit(run_app(sys.argv[1:]))


def run_app(arguments: list[str]) -> int:
    """Run one command and return its exit code. Known errors are printed as one sentence, without a traceback."""
    try:
        app(arguments, standalone_mode=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):  # what Python's own exit() does with a text
            say(stop.code, style="red")
            return 1
        return stop.code or 0
    except InputError as error:
        say(f"error: {error}", style="red")
        return 2
    except RunFailed as error:
        say(f"failed: {error}", style="red")
        return 1
    return 0


@app.command(
    epilog="Example: raybert prepare --input 'gs://bucket/text/*.parquet' --output gs://bucket/shards --seq-len 512"
)
def prepare(
    input: Annotated[list[str], typer.Option(help="file, directory or glob at any URI; may be repeated")],
    output: Annotated[str, typer.Option(help="directory for the shard set, at any URI")],
    seq_len: Annotated[int, typer.Option(help="tokens of a training sequence, special tokens included")],
    text_column: Annotated[str, typer.Option(help="column or field that holds the text")] = "text",
    validation_fraction: Annotated[
        float, typer.Option(help="fraction of the documents held out for validation")
    ] = 0.01,
    max_bad_fraction: Annotated[float, typer.Option(help="fraction of unusable documents to accept")] = 0.01,
    split_txt: Annotated[str, typer.Option(help="split .txt files into documents at blank-lines or lines")] = "",
    hold_out: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="leave out the test texts of this probe task; may be repeated"),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(metavar="WHERE", help="directory with tokenizer.json or vocab.txt, checkpoint, or Hub name")
    ] = "gpt2",
    overwrite: Annotated[bool, typer.Option(help="replace an existing shard set")] = False,
) -> None:
    """Turn raw text (parquet, jsonl, txt) into token shards."""
    from raybert import cluster
    from raybert.data.text.prepare import prepare as run
    from raybert.probe.tasks import held_out, load_task
    from raybert.tokenizer.files import load_for_training

    used = load_for_training(tokenizer)  # before a Ray is started, which takes seconds
    kept_out = held_out(map(load_task, hold_out or []))
    cluster.connect()
    run(
        input,
        output,
        seq_len=seq_len,
        text_column=text_column,
        validation_fraction=validation_fraction,
        max_bad_fraction=max_bad_fraction,
        split_txt=split_txt,
        held_out=kept_out,
        tokenizer=used,
        overwrite=overwrite,
        progress=True,
    )


@app.command(epilog="Example: raybert pretrain jobs/compact.yaml data.shards=gs://bucket/shards train.workers=4")
def pretrain(
    config: Annotated[str, typer.Argument(help="YAML file of settings, at any URI", show_default=False)] = "",
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="run directory to resume, instead of a YAML file")] = "",
    dry_run: DryRun = False,
) -> None:
    """Train an encoder, or resume its training.

    Rerun the same command to resume from the newest checkpoint.
    """
    from raybert import cluster
    from raybert import config as configs
    from raybert.preload import preloaded
    from raybert.probe.tasks import passed_over
    from raybert.ray_internals.names import PRESTART
    from raybert.train.check import check, check_inputs

    if not (config or resume):
        raise InputError("Give a YAML file of settings, or --resume RUN.")
    # With --resume the first word behind the command is a setting too.
    words = [word for word in (config, *(overrides or [])) if word]
    settings = configs.load_run(resume, words) if resume else configs.load(config, overrides or [])
    inputs = check_inputs(settings)  # before a Ray is started, which takes seconds
    for task in inputs.tasks:
        if line := passed_over(task):
            say(f"probe task {task.name}: {line}")
    if not dry_run:
        # Processes that Ray starts when a driver registers lack the environment of a run's, so no run uses them.
        os.environ.setdefault(PRESTART, "0")
    with preloaded("torch", "matplotlib.figure", "pandas"):
        local = cluster.connect()
    from raybert.pretrain import drive
    from raybert.report import live
    from raybert.report.read import read_run

    run = check(settings, inputs=inputs)
    if dry_run:
        from raybert.train.dry_run import estimate, show

        Console(soft_wrap=True).print(show(run, estimate(run)))
        if run.tasks:
            from raybert.probe import plan

            threads = plan.threads_of(run.shares.probe)
            options: dict[str, Any] = {"threads": threads, "gpu": run.config.probe.gpus > 0}
            options["begins_random"] = run.config.model.begins_random
            found = plan.costs(run.tasks, run.config.model.bert(), run.shards.tokenizer(), **options)
            Console(soft_wrap=True).print(plan.table(found, threads=threads))
        return
    steps = settings.train.steps
    windows = f"{run.shards.rows('train'):,} training and {run.shards.rows('validation'):,} validation windows"
    print(f"run {run.uri}: {steps} steps, {windows}", flush=True)
    if settings.every.validation and not run.shards.rows("validation"):
        print("no validation: the shards were prepared with --validation-fraction 0", flush=True)
    drive(run, live.showing(run.config, Console()), wait_for_probes=local)
    kept = f"checkpoints in {run.uri}/checkpoints" if settings.every.checkpoint else "no checkpoint: every.checkpoint=0"
    print(f"done: {steps} steps, {kept}", flush=True)
    if said := read_run(run.uri).no_best:
        print(said, flush=True)


@app.command(epilog="Example: raybert sweep jobs/sweep.yaml base.data.shards=shards-128 base.train.steps=2000")
def sweep(
    config: Annotated[str, typer.Argument(help="sweep file (YAML), at any URI")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume an interrupted sweep")] = False,
    dry_run: DryRun = False,
) -> None:
    """Compare settings over many trials.

    Trials that are worse at equal tokens are stopped early. The result names the best learning rate of each size.
    """
    from raybert import cluster
    from raybert.sweep import space
    from raybert.sweep.end_to_end import sweep_and_summarise
    from raybert.sweep.run import check_data

    settings = space.load(config, overrides or [])
    check_data(settings, space.trials(settings))  # before a Ray is started, which takes seconds
    local = cluster.connect()
    if dry_run:
        from raybert.sweep.run import estimate_sweep
        from raybert.train.dry_run import show_sweep

        Console().print(show_sweep(settings.model_dump(mode="json"), *estimate_sweep(settings)))
        return
    sweep_and_summarise(settings, resume=resume, local=local)


@app.command(epilog="Example: raybert report gs://bucket/runs/compact")
def report(
    run: Annotated[str, typer.Argument(help="run directory, at any URI")],
    figure: Annotated[str, typer.Option(help="also draw losses and probes against tokens, as this PNG file")] = "",
) -> None:
    """Write RUN/report.html, a self-contained page.

    It shows the loss curves, the probes with their baselines, and the settings. The last line printed is its path.
    """
    from raybert.report.page import write_report

    if figure:
        storage.absolute(figure)  # refuses what is no path, before the page is written
    page = write_report(run)
    if figure:
        from raybert.report.figure import write_figure

        write_figure(run, figure)
        print(figure)
    print(page)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example: raybert submit pretrain jobs/compact.yaml data.shards=gs://bucket/shards",
)
def submit(
    command: Annotated[
        list[str], typer.Argument(help="prepare, pretrain, sweep, probe, embed, report or doctor, with its arguments")
    ],
    address: Annotated[str | None, typer.Option(help="URL of the cluster's dashboard", show_default=False)] = None,
    directory: Annotated[str, typer.Option(help="checkout whose code the job runs")] = ".",
    follow: Annotated[
        bool, typer.Option("--follow", help="print the job's output and exit with its exit code")
    ] = False,
) -> None:
    """Run a command as a job on a cluster."""
    from raybert.cluster import jobs
    from raybert.submit import submit as send

    job = send(command, address=address, directory=directory)
    print(f"job        {job.id}\ndashboard  {job.dashboard}\nfollow     {job.follow}", flush=True)
    if follow:
        raise typer.Exit(jobs.follow(job, lambda text: print(text, end="", flush=True)))


@app.command(epilog="Example: raybert watch gs://bucket/runs/compact")
def watch(
    run: Annotated[str, typer.Argument(help="run directory, at any URI")],
    once: Annotated[bool, typer.Option("--once", help="print the current state and exit")] = False,
) -> None:
    """Follow a run live: losses, speed, waits and probes.

    It reads only the run directory, so it works from any machine, and for a finished run too.
    """
    from raybert.report import live

    live.watch(run, once=once)


@app.command(epilog="Example: raybert demo --task ag_news@my-files")
def demo(
    task: Annotated[
        str, typer.Option(help="probe task: bbc_news (built in), ag_news, or a task's YAML file")
    ] = "bbc_news",
    directory: Annotated[str, typer.Option(help="directory for the run and its data")] = "runs",
    overrides: Overrides = None,
) -> None:
    """Train a small BERT on real text, in minutes."""
    from raybert.demo import run_demo

    print(run_demo(task, directory, overrides or []))


@app.command(epilog="Example: raybert verify gs://bucket/runs/compact")
def verify(run: Annotated[str, typer.Argument(help="run directory, at any URI")]) -> None:
    """Check a run's shards, checkpoints, log, ledger and probes.

    The exit code is 1 if anything is wrong.
    """
    from raybert.verify import verify as look

    faults = 0
    for finding in look(run):
        faults += bool(finding.fault)
        print(f"{finding.subject:>24}  {'WRONG: ' + finding.fault if finding.fault else 'ok: ' + finding.detail}")
    if faults:
        raise RunFailed(f"{faults} parts of the run failed their check; see the lines marked WRONG.")


@app.command(epilog="Example: raybert doctor jobs/compact.yaml run.storage=gs://bucket/runs")
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="YAML file of the run's settings, at any URI", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check a cluster before a run.

    Checks versions, storage, memory, CPUs, clocks and the dashboard's token on every node, and says how to fix what
    is wrong.
    """
    from raybert import cluster
    from raybert import config as configs
    from raybert.doctor.examine import examine

    settings = configs.load(config, overrides or []) if config is not None else None
    cluster.connect()
    lines = 0
    wrong = 0
    for line in examine(settings):
        lines, wrong = lines + 1, wrong + bool(line.remedy)
        print(f"{line.subject:>12}  {line.verdict}: {line.detail}", flush=True)
        if line.remedy:
            print(f"{'':>12}  what to do: {line.remedy}", flush=True)
    if wrong:
        raise RunFailed(f"{wrong} of {lines} checks failed; see what to do below each.")


@app.command(epilog="Example: raybert bench --size base --samples 16 --seq-len 128")
def bench(
    size: Annotated[
        str, typer.Option(help="named size of the encoder: tiny, mini, compact, small or base")
    ] = "compact",
    samples: Annotated[int, typer.Option(help="samples of a micro-batch")] = 4,
    seq_len: Annotated[int, typer.Option(help="tokens of a sample")] = 512,
) -> None:
    """Measure training speed on this machine.

    Measures the training step, the data stream, and the step's share of the machine's peak rate (MFU).
    """
    from raybert import cluster
    from raybert.bench import check_shape, run_bench

    check_shape(size, samples, seq_len)
    cluster.start()  # of this machine alone, also where RAY_ADDRESS names a cluster
    found = run_bench(size, samples, seq_len)
    print(
        f"{found['size']}, {samples} x {seq_len} tokens, {found['dtype']} on {found['device']}: "
        f"{found['tokens_per_second']:,.0f} tokens/s, {100 * found['mfu']:.1f} % of "
        f"{found['gemm_tflops']:.2f} TFLOP/s; the stream delivers {found['stream_tokens_per_second']:,.0f} tokens/s"
    )
    for note in found["notes"]:
        print(note)


if __name__ == "__main__":
    main()
