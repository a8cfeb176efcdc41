"""What a run would take: the size of the model, memory and operations, and the time, measured on three real steps."""

import math
import os
import resource
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
import yaml
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from raybert.config import Config, from_mapping
from raybert.data.reader import SampleReader
from raybert.data.shards import open_shards
from raybert.data.spec import sample_spec
from raybert.errors import RunFailed, last_line
from raybert.model import optimizer as optimizers
from raybert.model.bert import Bert
from raybert.model.precision import pick_dtype
from raybert.records import format_seconds
from raybert.spectral.recipe import Recipe
from raybert.spectral.table import find, places_of
from raybert.train import gpu_memory
from raybert.train.alone import alone
from raybert.train.check import Run
from raybert.train.flops import run_flops_per_token
from raybert.train.memory import worker_environment
from raybert.train.step import train_step

STEPS = 3
MOST_MICRO_BATCHES = 4  # of a measured step; a step of more is counted up from these
PATIENCE = 300.0  # seconds until the cluster must have placed and run the measurement
# float32: the weights, their gradients, and AdamW's two moments.
STATE_BYTES = 4 * 4


@dataclass(frozen=True)
class Estimate:
    """Of one run. `seconds` is all steps, without validation, checkpoints and the exchange of gradients."""

    parameters: int
    tokens: int  # positions of all training samples, padding included
    flops: float
    state_bytes: int  # of one worker: weights, gradients, optimizer
    peak_bytes: int  # measured: of the GPU, or of the whole process on a CPU
    checkpoint_bytes: int
    seconds: float
    device: str
    dtype: str
    accumulation: int
    notes: tuple[str, ...] = ()  # what this machine cannot do, in sentences


def estimate(run: Run) -> Estimate:
    """Measure on the cluster, with the workers and resources that the run would have. Nothing is written.

    Raises:
        RunFailed: the workers could not be placed in time, or failed: out of memory, for one.
    """
    config, workers = run.config, run.config.train.worker_range[0]
    options: dict[str, Any] = {"num_cpus": run.shares.worker, "num_gpus": 1 if run.shares.use_gpu else 0}
    options["runtime_env"] = {"env_vars": worker_environment(run.shares.use_gpu)}  # as the run's workers have it
    # Beside each other, as they will train: on one machine they share its caches and its memory.
    tasks = [_measure.options(**options).remote(config.model_dump(mode="json"), rank) for rank in range(workers)]
    try:
        found: list[dict[str, Any]] = ray.get(tasks, timeout=PATIENCE)
    except ray.exceptions.GetTimeoutError as error:
        for task in tasks:
            ray.cancel(task, force=True)
        raise RunFailed(
            f"The cluster did not run {workers} workers for the measurement within {PATIENCE:.0f} s; check "
            "that it has free CPUs and GPUs."
        ) from error
    except ray.exceptions.RayError as error:
        raise RunFailed(f"The measurement of three steps failed: {last_line(error)}") from error
    slowest = max(found, key=lambda one: one["seconds"])
    tokens = config.train.steps * config.train.global_batch * run.shards.seq_len
    return Estimate(
        parameters=slowest["parameters"],
        tokens=tokens,
        flops=tokens * run_flops_per_token(config, run.shards.seq_len),
        state_bytes=STATE_BYTES * slowest["parameters"],
        peak_bytes=max(one["peak_bytes"] for one in found),
        checkpoint_bytes=3 * 4 * slowest["parameters"],  # weights and both moments
        seconds=slowest["seconds"] * config.train.steps,
        device=slowest["device"],
        dtype=slowest["dtype"],
        notes=tuple(dict.fromkeys(note for one in found for note in one["notes"])),
        accumulation=config.train.global_batch // (config.train.micro_batch * workers),
    )


@ray.remote(max_retries=0, max_calls=1)  # a process of its own: its peak of memory is what is measured
def _measure(settings: dict[str, Any], rank: int) -> dict[str, Any]:
    config = from_mapping(settings)
    try:
        return measure(config, rank)
    except RuntimeError as error:
        if gpu_memory.exhausted(error):
            raise RunFailed(gpu_memory.sentence(error, config, step=1)) from None
        raise


def measure(config: Config, rank: int) -> dict[str, Any]:
    """Three steps of one worker, alone, on the first samples of the data; one more before them is not timed.

    Returns:
        seconds of one step of the run; peak_bytes, parameters, device, dtype, and notes on what cannot be done here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    train = config.train
    dtype = pick_dtype(train.dtype, device)
    bert = Bert(config.model.bert()).to(device)
    bert.gradient_checkpointing = train.gradient_checkpointing
    optimizer = optimizers.build(bert, **config.optimizer.model_dump())
    objective, shards = config.objective.objective(), open_shards(config.data.shards)
    samples = sample_spec(config, shards.vocabulary)
    of_a_step = train.global_batch // (train.micro_batch * train.worker_range[0])
    count = min(of_a_step, MOST_MICRO_BATCHES)
    reader = SampleReader(shards, seed=config.data.seed, spec=samples)
    first = rank * count * train.micro_batch
    worker = alone(
        bert,
        objective,
        samples,
        device=device,
        dtype=dtype,
        micro_batch=train.micro_batch,
        seq_len=shards.seq_len,
        compile=train.compile,
        packing=train.packing,
    )
    parts = [
        reader.build(np.arange(start, start + train.micro_batch))
        for start in range(first, first + count * train.micro_batch, train.micro_batch)
    ]

    def one_step(step: int, count: int) -> None:
        sums, _ = train_step(
            worker.model,
            optimizer,
            worker.feed(parts[:count]),
            lr=config.optimizer.lr / 100,
            grad_clip=train.grad_clip,
            dtype=dtype,
            seed=train.seed,
            step=step,
            first_micro_batch=0,
            global_batch=count * train.micro_batch,
            objective=objective,
        )
        sums.tolist()  # waits for the device

    def seconds(count: int) -> float:
        """Of a step of so many micro-batches: the mean of a few, after one that is not timed."""
        one_step(0, count)
        start = time.perf_counter()
        for step in range(1, STEPS + 1):
            one_step(step, count)
        return (time.perf_counter() - start) / STEPS

    whole = seconds(count)
    if of_a_step > count:
        # The update of the weights is made once a step, however many micro-batches it has.
        whole += (of_a_step - count) * max(0.0, whole - seconds(1)) / (count - 1)
    on_gpu = device.type == "cuda"
    return {
        "seconds": whole,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else _process_peak(),
        "parameters": sum(parameter.numel() for parameter in bert.parameters()),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "notes": worker.notes,
    }


def _process_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(run: Run, found: Estimate) -> RenderableType:
    """The resolved settings, and below them the figures."""
    train = run.config.train
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("parameters", f"{found.parameters:,}"),
        ("data", f"{run.shards.rows('train'):,} windows of up to {run.shards.seq_len} tokens in {run.shards.uri}"),
        ("start", _start(run)),
        ("samples", f"{train.steps * train.global_batch:,}: {_epochs(run):.2f} passes over the data"),
        ("tokens", f"{found.tokens:,} positions, padding included"),
        ("operations", f"{found.flops:.3g} FLOPs"),
        ("workers", f"{train.worker_range[0]} of {run.shares.worker:g} CPUs each, {found.device}, {found.dtype}"),
        ("step", f"{train.global_batch} samples: {found.accumulation} micro-batches of {train.micro_batch} per worker"),
        ("schedule", f"{run.config.warmup_steps:,} warm-up steps, then {run.config.schedule.decay}"),
        (
            "memory per worker",
            f"{_size(found.peak_bytes)} at most, measured; {_size(found.state_bytes)} of it the model",
        ),
        ("checkpoint", f"{_size(found.checkpoint_bytes)}, {run.config.checkpoint.keep_last} kept"),
        ("time", f"{format_seconds(found.seconds)} for {train.steps:,} steps, from {STEPS} measured ones"),
        ("", "without validation, checkpoints and the exchange of gradients between workers"),
        *(("note", sentence) for sentence in found.notes),
    ):
        table.add_row(name, escape(value))
    return Group(escape(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)), table)


def show_sweep(
    settings: dict[str, Any], rows: list[tuple[str, dict[str, Any], Estimate]], concurrent: int
) -> RenderableType:
    """The resolved settings; a row a trial, and the whole sweep's time when no trial is stopped early."""
    keys = list(rows[0][1])
    # Short, so that a sweep over two settings fits into 80 columns.
    last = [key.rpartition(".")[2] for key in keys]
    heads = last if len(set(last)) == len(last) else keys
    table = Table("trial", *heads, "param.", "tokens", "FLOPs", "memory", "saved", "time", box=box.SIMPLE_HEAD)
    for name, point, found in rows:
        values = (f"{point[key]:g}" if isinstance(point[key], float) else str(point[key]) for key in keys)
        sizes = (_size(found.peak_bytes), _size(found.checkpoint_bytes))
        counts = (_count(found.parameters), _count(found.tokens), f"{found.flops:.1e}")
        table.add_row(name.removeprefix("trial-"), *map(escape, values), *counts, *sizes, format_seconds(found.seconds))
    total = sum(found.seconds for _, _, found in rows) / concurrent
    table.caption = (
        f"{len(rows)} trials, {concurrent} at a time: {format_seconds(math.ceil(total))} if none is stopped "
        "early; memory: peak of a worker; saved: size of a checkpoint"
    )
    return Group(escape(yaml.safe_dump(settings, sort_keys=False)), table)


def _start(run: Run) -> str:
    """Where the first weights come from."""
    model = run.config.model
    if model.start_from:
        return f"the weights of {model.start_from}"
    words = "random token vectors"
    if model.needs_vectors:
        recipe = Recipe(run.config.data.seed)
        tokens = min(recipe.sample_tokens, run.shards.tokens("train"))
        made = "already computed" if find(run.shards, recipe, *places_of(run.config)) else "computed first"
        kind = "whitened token vectors" if model.embedding_init == "whitened" else "token vectors"
        words = f"{kind} from {tokens:,} tokens, {made}"
    others = {
        "zero": "feed-forward layers at zero",
        "centred": "centred vectors",
        "unigram": "token frequencies in the output layer",
    }
    more = "".join(f", {others[i]}" for i in (model.ffn_init, model.output_init, model.mlm_init) if i in others)
    return f"{words}, {model.attention_init} attention{more}"


def _epochs(run: Run) -> float:
    return run.config.train.steps * run.config.train.global_batch / run.shards.rows("train")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _count(count: int) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
