"""The Ray stream against the in-process reader: the same samples, bit for bit, for any number of workers."""

import re
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import ray
from ray.data import DataContext

from raybert import bench
from raybert.cli import run_app
from raybert.data.block import widen
from raybert.data.reader import iter_batches
from raybert.data.stream import (
    FIRST_AHEAD,
    MOST_AHEAD,
    PREFETCHED_BLOCKS,
    StreamSpec,
    blocks_of,
    chapter_steps,
    execution_options,
    train_stream,
    worker_batches,
)
from tests.data import make_shards

pytestmark = pytest.mark.usefixtures("ray_cluster")
G, SEED = 12, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")))


@ray.remote(num_cpus=0)
def consume(shard, **where):
    return [(step, [widen(part) for part in parts]) for step, parts in worker_batches(blocks_of(shard), **where)]


def spec(uri, steps):
    return StreamSpec(uri, seed=SEED, global_batch=G, steps=steps, task_cpus=0.5)


def stream_steps(uri, workers, start_step, steps):
    """Every rank's micro-batches, as a real splitter and real tasks deliver them."""
    dataset = train_stream(spec(uri, steps), world_size=workers, start_step=start_step)
    dataset.context.execution_options = execution_options()
    where = {"world_size": workers, "global_batch": G, "micro_batch": 2, "start_step": start_step, "steps": steps}
    splits = dataset.streaming_split(workers, equal=True)
    return ray.get([consume.remote(split, rank=rank, **where) for rank, split in enumerate(splits)])


@pytest.mark.parametrize(("workers", "start_step"), [(1, 0), (2, 0), (2, 1_000_003), (3, 77)])
def test_the_stream_is_the_reader(shards, workers, start_step):
    steps = start_step + chapter_steps(G, 0) + 40  # into a second chapter, and not to its end
    for rank, received in enumerate(stream_steps(shards.uri, workers, start_step, steps)):
        assert [step for step, _ in received] == list(range(start_step, steps))
        expected = iter_batches(
            shards.uri, seed=SEED, global_batch_size=G, start_step=start_step, rank=rank, world_size=workers
        )
        for (_, parts), batch in zip(received, islice(expected, len(received)), strict=True):
            assert all(len(part["index"]) == 2 for part in parts)
            for name, values in batch.items():
                found = np.concatenate([part[name] for part in parts])
                assert found.dtype == values.dtype
                assert np.array_equal(found, values), name


def test_tasks_stay_a_few_chapters_ahead_of_the_workers(shards, monkeypatch):
    # However long the workers take for a chapter, the stream is not stuck.
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 2.0)
    chapters, span = 60, chapter_steps(G, 1_000_000)
    options = {"start_step": 0, "steps": chapters * span, "world_size": 1, "global_batch": G}
    dataset = train_stream(spec(shards.uri, chapters * span), world_size=1, start_step=0)
    dataset.context.execution_options = execution_options()
    (shard,) = dataset.streaming_split(1, equal=True)

    def built():
        found = re.search(r"ReadRange.*?: (\d+) tasks executed", shard.stats())
        return int(found[1]) if found else 0

    # Closed while Ray is there: the end of an iteration is told to an actor, and that would start another Ray.
    with closing(worker_batches(blocks_of(shard), rank=0, micro_batch=G, **options)) as batches:
        for taken in (1, 10):
            while next(batches)[0] < (taken - 1) * span:
                pass
            count, known = 0, -1
            while not taken < count == known:  # until no further one is built
                known = count
                time.sleep(3)
                count = built()
            held = taken + PREFETCHED_BLOCKS + 1  # by the worker
            assert taken < count <= held + min(FIRST_AHEAD + held, MOST_AHEAD)


def test_a_wrong_sample_stops_the_loop(shards):
    dataset = train_stream(spec(shards.uri, 10), world_size=1, start_step=5)
    # The consumer was restored to another step than the stream was built for.
    where = {"rank": 0, "world_size": 1, "global_batch": G, "micro_batch": 12, "start_step": 4, "steps": 10}
    with pytest.raises(RuntimeError, match="no sample is lost or seen twice"):
        next(worker_batches(blocks_of(dataset.iterator()), **where))


def test_a_missing_shard_is_an_error_that_names_it(tmp_path):
    broken = make_shards(str(tmp_path))
    for shard in broken.shards():
        (tmp_path / shard.name).unlink()
    dataset = train_stream(spec(broken.uri, 10), world_size=1, start_step=0)
    where = {"rank": 0, "world_size": 1, "global_batch": G, "micro_batch": 12, "start_step": 0, "steps": 10}
    with pytest.raises(Exception, match=r"train-0000\d-of-00002.parquet"):
        next(worker_batches(blocks_of(dataset.iterator()), **where))


def test_bench_prints_rates_and_shares_of_this_machine(monkeypatch, capsys):
    # The longer stream is so much longer that it takes longer on a busy machine, too.
    monkeypatch.setattr(bench, "MOST_SAMPLES", 128)
    monkeypatch.setattr(bench, "STREAM_STEPS", 600)
    assert run_app(["bench", "--size", "tiny", "--samples", "2", "--seq-len", "64"]) == 0
    said = capsys.readouterr().out
    found = re.search(r"tiny, 2 x 64 tokens.* ([\d,]+) tokens/s, ([\d.]+) % of .* delivers ([\d,]+)", said)
    assert found
    assert all(float(number.replace(",", "")) > 0 for number in found.groups())
    assert run_app(["bench", "--size", "huge"]) == 2
