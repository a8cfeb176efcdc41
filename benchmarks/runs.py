"""Runs of the compact model that take turns (`benchmarks.turns`): `raybert pretrain` as a program, and bare loops.

`python -m benchmarks.runs '{"name": ..}'` is the driver of a run in a Ray of its own, `... bare SHARDS THREADS BATCH`
a plain loop over the same samples in memory, alone or as a rank of torchrun.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.turns import Side
from raybert.bench import OPTIMIZER, random_shards

MICRO_BATCH, SEQ_LEN = 2, 512
KEPT_STEPS = 16  # of the bare loop's batches, which come round again


def shards(folder: str) -> str:
    return random_shards(f"{folder}/shards", seq_len=SEQ_LEN)


def ray_side(folder: str, uri: str, name: str, *, workers: int, threads: int, global_batch: int, settle: float) -> Side:
    """A whole run in Ray Train, which goes on for as long as it is let."""
    tree = {
        "run": {"name": name, "storage": folder},
        "data": {"shards": uri, "task_cpus": 0.25, "verify": "sizes"},
        "model": {"size": "compact"},
        "train": {
            "steps": 100_000,
            "global_batch": global_batch,
            "micro_batch": MICRO_BATCH,
            "workers": workers,
            "worker_cpus": threads,
            "hang_seconds": 3600.0,
        },
        "schedule": {"warmup_steps": 2},
        "every": {"log": 1, "validation": 0, "probe": 0, "checkpoint": 0},
    }
    arguments = ["-m", "benchmarks.runs", json.dumps(tree)]
    log, rates = Path(folder, f"{name}.log"), Path(folder, name, "metrics.jsonl")
    return Side(arguments, log, rates, settle=settle, RAY_TMPDIR=folder)


def bare_side(folder: str, uri: str, name: str, *, processes: int, threads: int, global_batch: int) -> Side:
    """The same step with no Ray: in one process, or as torchrun starts several."""
    started = ["-m"]
    if processes > 1:
        started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    arguments = [*started, "benchmarks.runs", "bare", uri, str(threads), str(global_batch)]
    # No servers that catch up on their timers: a step later all is as it was.
    return Side(arguments, Path(folder, f"{name}.log"), settle=0.5, OMP_NUM_THREADS=str(threads))


def drive(tree: dict[str, Any]) -> None:
    """The driver of a run, in a Ray with CPUs to spare, so that a worker's CPUs are the threads it gets."""
    from raybert import cluster
    from raybert.config import from_mapping
    from raybert.train.check import check
    from raybert.train.run import train

    cluster.launch(4)
    train(check(from_mapping(tree)))


def step_for_ever(uri: str, threads: int, global_batch: int) -> None:
    """Train on samples of the plan that lie in memory, and print the rate of each step."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from raybert.data.reader import SampleReader
    from raybert.data.shards import open_shards
    from raybert.data.tensors import to_torch
    from raybert.model import optimizer
    from raybert.model.bert import Bert
    from raybert.model.config import BertConfig
    from raybert.model.losses import Pretraining
    from raybert.model.precision import pick_dtype
    from raybert.train.memory import tune_memory
    from raybert.train.step import all_reduce_sums, train_step

    torch.set_num_threads(threads)
    tune_memory()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device, part = torch.device("cpu"), global_batch // world_size
    torch.manual_seed(0)
    bert = Bert(BertConfig())
    adam, model = optimizer.build(bert, **OPTIMIZER), Pretraining(bert)
    if world_size > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)  # type: ignore[assignment]
    reader = SampleReader(open_shards(uri), seed=0)
    steps = []
    for first in range(rank * part, KEPT_STEPS * global_batch, global_batch):
        places = [np.arange(at, at + MICRO_BATCH) for at in range(first, first + part, MICRO_BATCH)]
        steps.append([to_torch(reader.build(place), device) for place in places])
    dtype = pick_dtype("auto", device)
    for step in itertools.count():
        parts = steps[step % KEPT_STEPS]
        tokens = torch.tensor([float(sum(int(batch["attention_mask"].sum()) for batch in parts))])
        start = time.perf_counter()
        keys = {"seed": 0, "step": step, "first_micro_batch": rank * len(parts), "global_batch": global_batch}
        sums, norm = train_step(model, adam, parts, lr=1e-4, grad_clip=1.0, dtype=dtype, **keys)
        all_reduce_sums(sums, world_size).tolist(), norm.item()
        rate = all_reduce_sums(tokens, world_size).item() / (time.perf_counter() - start)
        if rank == 0:
            print(f"tokens_per_second {rate:.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "bare":
        step_for_ever(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        drive(json.loads(sys.argv[1]))
