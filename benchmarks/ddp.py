"""Tokens per second of two workers with a thread each; beside it one worker with two threads, and torchrun.

torchrun starts the same step on the same samples (in memory) in two processes with DistributedDataParallel over gloo;
its rate is the limit.
"""

import os
import re
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import medians, result
from benchmarks.runs import MICRO_BATCH, SEQ_LEN, local_ray, pretrain

STEPS, GLOBAL_BATCH = 8, 32


def torchrun_worker(uri: str) -> None:
    """What a rank of torchrun does: print the rate of rank 0."""
    import statistics
    import time

    import numpy as np

    from raybert.bench import OPTIMIZER
    from raybert.data.reader import SampleReader
    from raybert.data.shards import open_shards
    from raybert.data.tensors import to_torch
    from raybert.model.bert import Bert
    from raybert.model.config import BertConfig
    from raybert.model.losses import Pretraining
    from raybert.train import optimizer
    from raybert.train.memory import keep_freed_memory
    from raybert.train.precision import pick_dtype
    from raybert.train.step import all_reduce_sums, train_step

    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    reader, part = SampleReader(open_shards(uri), seed=0), GLOBAL_BATCH // world_size
    bert = Bert(BertConfig())
    adam = optimizer.build(bert, **OPTIMIZER)
    model = DistributedDataParallel(Pretraining(bert), gradient_as_bucket_view=True)
    dtype, rates = pick_dtype("auto", torch.device("cpu")), []
    for step in range(STEPS):
        begin = step * GLOBAL_BATCH + rank * part
        places = [np.arange(first, first + MICRO_BATCH) for first in range(begin, begin + part, MICRO_BATCH)]
        parts = [to_torch(reader.build(place), torch.device("cpu")) for place in places]
        tokens = torch.tensor([float(sum(int(p["attention_mask"].sum()) for p in parts))])
        start = time.perf_counter()
        keys = {"seed": 0, "step": step, "first_micro_batch": rank * len(parts), "global_batch": GLOBAL_BATCH}
        sums, _ = train_step(model, adam, parts, lr=1e-4, grad_clip=1.0, dtype=dtype, **keys)
        all_reduce_sums(sums, world_size).tolist()
        rates.append(all_reduce_sums(tokens, world_size).item() / (time.perf_counter() - start))
    if rank == 0:
        print(f"rate {statistics.median(rates[STEPS // 2 :])}", flush=True)
    dist.destroy_process_group()


def torchrun(uri: str) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "benchmarks.ddp", "--worker", uri],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    found = re.search(r"^rate (\S+)", done.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"torchrun failed: {done.stderr[-2000:]}")
    return float(found[1])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        torchrun_worker(sys.argv[2])
        return
    runs = 0
    with tempfile.TemporaryDirectory() as folder, local_ray(folder) as shards:

        def run(workers: int, threads: int) -> float:
            nonlocal runs
            runs += 1
            options = {"workers": workers, "threads": threads, "steps": STEPS, "global_batch": GLOBAL_BATCH}
            return pretrain(shards, folder, f"run-{runs}", **options)[0]

        sides = (lambda: run(2, 1), lambda: run(1, 2), lambda: torchrun(shards.uri))
        first, one, peer = medians(*sides, rounds=3)
    extra = {"one_worker_two_threads": one, "against_one_worker": first / one, "seq_len": SEQ_LEN}
    result("ddp", first, peer, peer, "real tokens/s", global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, **extra)


if __name__ == "__main__":
    main()
