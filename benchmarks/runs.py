"""Whole runs for the benchmarks: `raybert pretrain` as a function, and what its log says of its speed."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from benchmarks.common import DATA
from raybert.config import from_mapping
from raybert.data.prepare import prepare
from raybert.data.shards import ShardSet
from raybert.telemetry import read_metrics
from raybert.train.check import check
from raybert.train.run import train

MICRO_BATCH, SEQ_LEN = 4, 512


@contextmanager
def local_ray(folder: str) -> Iterator[ShardSet]:
    """A Ray with CPUs to spare, so that a worker's CPUs are the threads it gets; and shards of real text."""
    ray.init(num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False)
    try:
        yield prepare([str(DATA / "corpus" / "research-00000-of-00002.parquet")], f"{folder}/shards", seq_len=SEQ_LEN)
    finally:
        ray.shutdown()


def pretrain(
    shards: ShardSet, folder: str, name: str, *, workers: int, threads: int, steps: int, global_batch: int
) -> tuple[float, dict[str, float]]:
    """Tokens per second of the compact model and mean waits, over the second half of the run's log lines: in the first
    one Ray's processes are still starting, and reading ahead, beside the worker.
    """
    tree = {
        "run": {"name": name, "storage": folder},
        "data": {"shards": shards.uri, "task_cpus": 0.25, "verify": "sizes"},
        "model": {"size": "compact"},
        "train": {
            "steps": steps,
            "global_batch": global_batch,
            "micro_batch": MICRO_BATCH,
            "workers": workers,
            "worker_cpus": threads,
        },
        "schedule": {"warmup_steps": 2},
        "every": {"log": 2, "validation": 0, "probe": 0, "checkpoint": 0},
    }
    run = check(from_mapping(tree))
    train(run)
    records = [record for record in read_metrics(run.uri) if "loss" in record]
    records = records[len(records) // 2 :]
    waits = {key: statistics.mean(r[key] for r in records) for key in ("wait_data", "wait_report")}
    return statistics.median(record["tokens_per_second"] for record in records), waits
