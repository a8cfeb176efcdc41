"""The plan as a Ray Data stream: read and built by tasks anywhere, dealt out to the workers in order.

One dataset covers the whole run, so there is no end of an epoch to get wrong. Its rows are *chapters* of S consecutive
steps. A task reads the units of a chapter once and yields W blocks, one a worker, each with that worker's samples of
the S steps. With `preserve_order` and equal blocks Ray Data's splitter deals block b to worker b mod W, whatever the
order in which tasks finish; the workers check the index of every sample they get.

    samples of a chapter, G = 4, W = 2, S = 2       0 1 2 3 | 4 5 6 7
    block of worker 0 / of worker 1                 0 1 4 5 / 2 3 6 7
"""

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataContext, ExecutionOptions

from raybert.data.block import Columns, from_table, take, to_table
from raybert.data.reader import SampleReader
from raybert.data.shards import open_shards
from raybert.data.spec import ORIGINAL, SampleSpec
from raybert.errors import InputError
from raybert.ray_internals.data import Progress, limit_starts, range_of, repartitioned
from raybert.storage.retry import FINAL, retry

T = TypeVar("T")

# Samples of a chapter: enough that a task costs more than its scheduling (with 8,192 the stream delivers half as much
# again as with 2,048, and a tenth more with 16,384), few enough that a short run begins at once and is shared out among
# several tasks, and that a worker's chapters are small beside its model (25 MB for one worker at T = 512).
LEAST_SAMPLES, MOST_SAMPLES = 2048, 16_384
CHAPTERS = 16  # of a run that is too short for the largest ones
# Ray Data plans its read tasks ahead, one by one; a longer run has more chapters in each.
MAX_READ_TASKS = 10_000
PREFETCHED_BLOCKS = 2
# Chapters that are being built or lie unread. First what a worker asks for before it has its first batch, and one more
# for each that the workers took, up to what keeps the tasks of some cores busy while the workers take turns.
FIRST_AHEAD, MOST_AHEAD, AHEAD_OF_WORKER = PREFETCHED_BLOCKS + 1, 16, 2
PAUSE = 0.1  # seconds


@dataclass(frozen=True)
class StreamSpec:
    """What a run's stream is made of, whatever step it begins at and however many workers share it."""

    shards_uri: str
    seed: int
    global_batch: int
    steps: int  # of the whole run
    task_cpus: float  # of a task that builds chapters
    samples: SampleSpec = ORIGINAL
    manifest: str = ""  # hash that the shard set's manifest must have, where it is known
    retry_seconds: float = 0.0  # for which a read that fails is tried again


@dataclass(frozen=True)
class ReadAhead:
    """Begins to build a chapter only while few are ahead of the workers.

    Without it Ray Data reads until its share of the object store is full. A chapter is an hour's work for a model that
    trains on a CPU, and all cores would build chapters through a run's first minutes. From then on the executor would
    spin on a whole core for the rest of the run: its loop sleeps only in its wait for tasks, and when all room is taken
    it has none, or such whose outputs it leaves where they are. So it is the beginning of tasks that is held back here,
    and the loop rests while no task is under way and no block waits to be handed on.
    """

    most: int  # chapters
    chapters_of_task: int

    def __call__(self, progress: Progress) -> bool:
        taken = progress.finished - progress.unread
        allowed = min(FIRST_AHEAD + taken * self.chapters_of_task, self.most)
        if (progress.running + progress.unread) * self.chapters_of_task < allowed:
            return True
        if not progress.running and not progress.waiting:
            time.sleep(PAUSE)
        return False


def execution_options() -> ExecutionOptions:
    """Options with which Ray Data deals the blocks to the workers in order."""
    return ExecutionOptions(preserve_order=True)


def chapter_steps(global_batch: int, steps: int) -> int:
    """S: steps of a chapter, of so many that are to be done."""
    samples = min(max(steps * global_batch // CHAPTERS, LEAST_SAMPLES), MOST_SAMPLES)
    return max(1, samples // global_batch)


def train_stream(spec: StreamSpec, *, world_size: int, start_step: int) -> ray.data.Dataset:
    """The blocks of the steps from `start_step` on in dealing order. The last chapter extends past the last step, so
    that all blocks are equal and none is cut; `worker_batches` stops at the last step.
    """
    global_batch, task_cpus = spec.global_batch, spec.task_cpus
    span = chapter_steps(global_batch, spec.steps - start_step)
    chapters = max(1, -(-(spec.steps - start_step) // span))

    def build_chapters(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        reader = _open_reader(spec)
        for chapter in batch["id"]:
            first = (start_step + int(chapter) * span) * global_batch
            samples = np.arange(first, first + span * global_batch)
            columns = _build(reader, samples, spec.retry_seconds)
            # (S, W, G / W) -> one block a worker
            places = np.arange(span * global_batch).reshape(span, world_size, -1)
            for worker in range(world_size):
                yield to_table(take(columns, places[:, worker].reshape(-1)))

    context = DataContext.get_current()
    context.enable_progress_bars = False
    chapters_ds = range_of(chapters, cpus=task_cpus, blocks=min(chapters, MAX_READ_TASKS))
    blocks = repartitioned(
        chapters_ds.map_batches(build_chapters, batch_size=None, num_cpus=task_cpus),
        rows=span * global_batch // world_size,
        cpus=task_cpus,
    )
    most = max(MOST_AHEAD, AHEAD_OF_WORKER * world_size)
    limit_starts(blocks, ReadAhead(most, chapters_of_task=max(1, chapters // MAX_READ_TASKS)))
    # A chapter may be more than half an hour's work, after which Ray Data would take the stream for stuck. A rank that
    # waits for data without end is found by its pulse.
    blocks.context.execution_no_progress_timeout_s = -1
    return blocks


def _open_reader(spec: StreamSpec) -> SampleReader:
    open_it = partial(_reader, spec.shards_uri, spec.seed, spec.manifest, spec.samples)
    return retry(open_it, f"opening {spec.shards_uri}", seconds=spec.retry_seconds)


@lru_cache(maxsize=2)
def _reader(shards_uri: str, seed: int, manifest: str, spec: SampleSpec) -> SampleReader:
    """Kept by a task's process for the next task: the manifest is read once, and the last units stay."""
    return SampleReader(open_shards(shards_uri, manifest), seed=seed, spec=spec)


def _build(reader: SampleReader, samples: np.ndarray, retry_seconds: float) -> Columns:
    try:
        # A shard that is on the manifest and not there may come back, as the rest of a storage.
        final = tuple(kind for kind in FINAL if kind is not FileNotFoundError)
        what = f"reading {reader.shards.uri}"
        return retry(partial(reader.build, samples), what, seconds=retry_seconds, final=final)
    except FileNotFoundError as error:
        raise InputError(f"{reader.shards.uri} is missing a shard that its manifest lists: {error}.") from error


def blocks_of(shard: Any) -> Generator[pa.Table]:
    """A worker's blocks of the stream, from its DataIterator."""
    yield from shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCHED_BLOCKS)


def ahead(blocks: Callable[[], Iterator[T]]) -> Generator[T]:
    """The same blocks. A thread requests the first one at once: it takes seconds, while the worker sets itself up."""
    begun: Future[tuple[Iterator[T], list[T]]] = Future()

    def begin() -> None:
        try:
            following = blocks()
            begun.set_result((following, list(itertools.islice(following, 1))))
        except BaseException as error:
            begun.set_exception(error)

    threading.Thread(target=begin, name="first block", daemon=True).start()

    def all_blocks() -> Generator[T]:
        following, first = begun.result()
        while first:  # and keep no block in the object store
            yield first.pop()
        yield from following

    return all_blocks()


def worker_batches(
    blocks: Generator[pa.Table],
    *,
    rank: int,
    world_size: int,
    global_batch: int,
    micro_batch: int,
    start_step: int,
    steps: int,
) -> Iterator[tuple[int, list[Columns]]]:
    """This worker's steps from its shard of the stream.

    Args:
        blocks: the worker's part of the stream, from `start_step` on; closed at the end.

    Yields:
        (step, micro-batches in compact columns).

    Raises:
        RuntimeError: a sample is not the one that the plan has at this place, or the stream ended early.
    """
    part = global_batch // world_size
    step = start_step
    with closing(blocks):
        for table in blocks:
            columns = from_table(table)
            for offset in range(0, len(columns["index"]), part):
                if step == steps:
                    return
                samples = take(columns, slice(offset, offset + part))
                first = step * global_batch + rank * part
                if not np.array_equal(samples["index"], np.arange(first, first + part)):
                    raise RuntimeError(
                        f"at step {step}, rank {rank} of {world_size} got the samples {samples['index'][:3]}... "
                        f"instead of {first}..{first + part - 1}; training stopped so that no sample is lost or "
                        "seen twice"
                    )
                yield step, [take(samples, slice(at, at + micro_batch)) for at in range(0, part, micro_batch)]
                step += 1
    if step < steps:
        raise RuntimeError(f"the stream ended at step {step} of {steps}")
