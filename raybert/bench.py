"""`raybert bench`: how fast this machine trains, step and stream, and what share of its own limit that is."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch

from raybert.data.block import Columns
from raybert.data.masking import max_masked
from raybert.data.shards import open_shards, shard_name, write_manifest, write_shard
from raybert.data.spec import ORIGINAL as SAMPLES
from raybert.data.stream import (
    CHAPTERS,
    MOST_SAMPLES,
    StreamSpec,
    blocks_of,
    execution_options,
    train_stream,
    worker_batches,
)
from raybert.data.units import UnitRows
from raybert.errors import InputError, RunFailed
from raybert.model import optimizer
from raybert.model.bert import Bert, flops_per_token
from raybert.model.config import BertConfig
from raybert.model.objective import ORIGINAL as OBJECTIVE
from raybert.model.peak import peak_flops
from raybert.model.precision import pick_dtype
from raybert.model.sizes import SIZES
from raybert.tokenizer import GPT2, NUM_TEXT_TOKENS, VOCAB_SIZE, Vocabulary
from raybert.train.alone import alone
from raybert.train.memory import tune_memory
from raybert.train.step import train_step

OPTIMIZER = {"lr": 1e-4, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6}
ROUNDS = 5  # steps whose median counts
STREAM_BATCH, STREAM_STEPS, STREAM_LENGTH = 64, 4096, 512
ROWS, UNIT_ROWS = 4096, 512  # of the shards that the stream is measured with


def check_shape(size: str, samples: int, seq_len: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        InputError: no such size, no sample, or more tokens than the named sizes have positions.
    """
    if size not in SIZES:
        raise InputError(f"There is no size {size!r}; use one of {', '.join(SIZES)}.")
    if not 8 <= seq_len <= 512 or samples < 1:
        raise InputError(
            "--samples must be at least 1 and --seq-len between 8 and 512: the named sizes have 512 positions."
        )


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_columns(samples: int, length: int, vocabulary: Vocabulary = GPT2) -> Columns:
    """A micro-batch of full windows with 15 % of the positions masked."""
    torch.manual_seed(0)
    ids = torch.randint(0, vocabulary.text_stop, (samples, length))
    positions = torch.stack([torch.randperm(length)[: max_masked(length)].sort().values for _ in range(samples)])
    return {
        "input_ids": ids.numpy().astype(vocabulary.dtype),
        "cut": np.full(samples, length // 2 + 1, np.int32),
        "length": np.full(samples, length, np.int32),
        "masked_positions": positions.numpy().astype(np.int32),
        "masked_labels": ids.gather(1, positions).numpy().astype(vocabulary.dtype),
        "next_sentence_label": np.zeros(samples, np.int8),
        "index": np.arange(samples),
        "document": np.arange(samples),
    }


def vocabulary_of(size: int) -> Vocabulary:
    """raybert's own with more or fewer tokens of text before its specials."""
    more = size - GPT2.size
    specials = {role: getattr(GPT2, role) + more for role in ("cls", "sep", "mask", "pad")}
    return replace(GPT2, size=size, drawn=((0, NUM_TEXT_TOKENS + more),), **specials)


class Stepper:
    """Optimizer steps of a named size, over and over on the same micro-batches, as a run does them on this machine:
    packed and compiled where it would be. Each call is a step; it returns the tokens of text per second.

    Args:
        parts: micro-batches of as many samples each.
    """

    def __init__(
        self,
        size: str,
        parts: Sequence[Columns],
        *,
        vocabulary: Vocabulary = GPT2,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        device = default_device()
        torch.manual_seed(0)
        bert = Bert(BertConfig(**SIZES[size], vocab_size=vocabulary.size)).to(device)
        self._parts, self._clock, self._step = parts, clock, 0
        self._dtype, self._adam = pick_dtype("auto", device), optimizer.build(bert, **OPTIMIZER)
        samples, length = parts[0]["input_ids"].shape
        shape: dict[str, Any] = {"micro_batch": samples, "seq_len": length}
        spec = replace(SAMPLES, vocabulary=vocabulary)
        self._worker = alone(bert, OBJECTIVE, spec, device=device, dtype=self._dtype, **shape)
        self.notes = self._worker.notes
        self()
        self()  # warm

    def __call__(self) -> float:
        start, parts = self._clock(), self._parts
        sums, _ = train_step(
            self._worker.model,
            self._adam,
            self._worker.feed(parts),
            lr=1e-4,
            grad_clip=1.0,
            dtype=self._dtype,
            seed=0,
            step=self._step,
            first_micro_batch=0,
            global_batch=sum(len(part["length"]) for part in parts),
            objective=OBJECTIVE,
        )
        sums.sum().item()  # waits for the device
        self._step += 1
        return sum(int(part["length"].sum()) for part in parts) / (self._clock() - start)


def stepper(
    size: str,
    samples: int,
    length: int,
    *,
    vocab_size: int = VOCAB_SIZE,
    clock: Callable[[], float] = time.perf_counter,
) -> Stepper:
    """Steps of one micro-batch of full windows."""
    vocabulary = vocabulary_of(vocab_size)
    return Stepper(size, [random_columns(samples, length, vocabulary)], vocabulary=vocabulary, clock=clock)


def step_rate(size: str, samples: int, length: int) -> dict[str, Any]:
    """Median tokens per second of a step, the machine's rate of matrix products, and the share of it (MFU)."""
    tune_memory()
    work, device = stepper(size, samples, length), default_device()
    rate = float(np.median([work() for _ in range(ROUNDS)]))
    dtype = pick_dtype("auto", device)
    peak = peak_flops(device, dtype, seconds=1.0)
    mfu = rate * flops_per_token(BertConfig(**SIZES[size]), length) / peak
    return {
        "size": size,
        "samples": samples,
        "length": length,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_per_second": rate,
        "gemm_tflops": peak / 1e12,
        "mfu": mfu,
        "notes": work.notes,
    }


@ray.remote(num_cpus=0.5)
def consume(shard: ray.data.DataIterator, batch: int, steps: int) -> int:
    """Tokens of a worker's batches."""
    where = {"rank": 0, "world_size": 1, "global_batch": batch, "micro_batch": batch, "start_step": 0, "steps": steps}
    return sum(int(part["length"].sum()) for _, parts in worker_batches(blocks_of(shard), **where) for part in parts)


def stream_rate(shards_uri: str, *, batch: int, steps: int) -> float:
    """Tokens per second that the connected Ray streams to one consumer when it is under way.

    A stream is longer than another one by so many steps, and takes so much longer: what it needs to start cancels out,
    and nothing counts that lay ready before a clock was started. Both are long enough to have chapters of the same
    size. One before them starts Ray's processes and takes the memory that the others find.

    Raises:
        RunFailed: the machine was so busy meanwhile that the shorter stream took longer.
    """
    least = CHAPTERS * MOST_SAMPLES // batch
    counts = (least, least, steps + least)
    _, (few, brief), (many, long) = (_consumed(shards_uri, batch, count) for count in counts)
    if long <= brief:
        raise RunFailed("This machine is too busy to measure the data stream; try again when it is idle.")
    return (many - few) / (long - brief)


def _consumed(shards_uri: str, batch: int, steps: int) -> tuple[int, float]:
    """Tokens of a stream, and the seconds it took from its start to its last batch."""
    start = time.perf_counter()
    spec = StreamSpec(shards_uri, seed=0, global_batch=batch, steps=steps, task_cpus=0.5)
    stream = train_stream(spec, world_size=1, start_step=0)
    stream.context.execution_options = execution_options()
    tokens = ray.get(consume.remote(stream.streaming_split(1, equal=True)[0], batch, steps))
    return tokens, time.perf_counter() - start


def random_shards(uri: str, *, seq_len: int = STREAM_LENGTH) -> str:
    """A shard set of full windows of random tokens in sentences of 20."""
    rng, length = np.random.default_rng(0), seq_len - 3
    ends = np.append(np.arange(20, length, 20), length).astype(np.uint16)
    windows = UnitRows(
        tokens=rng.integers(0, NUM_TEXT_TOKENS, ROWS * length).astype(np.uint16),
        token_offsets=np.arange(ROWS + 1) * length,
        ends=np.tile(ends, ROWS),
        end_offsets=np.arange(ROWS + 1) * len(ends),
        doc=np.arange(ROWS) // 4,
    )
    shard = write_shard(uri, shard_name("train", 0, 1), windows, UNIT_ROWS)
    write_manifest(
        uri, seq_len=seq_len, unit_rows=UNIT_ROWS, splits={"train": [shard]}, counts={}, settings={}, inputs={}
    )
    return open_shards(uri).uri


def run_bench(size: str, samples: int, length: int) -> dict[str, Any]:
    """The step at one shape and the stream, with Ray connected."""
    found = step_rate(size, samples, length)
    with tempfile.TemporaryDirectory() as folder:
        found["stream_tokens_per_second"] = stream_rate(random_shards(folder), batch=STREAM_BATCH, steps=STREAM_STEPS)
    return found
