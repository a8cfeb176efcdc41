"""Tokens per second of a whole run in Ray Train, one worker on one thread, beside the same step in a bare Python loop.

The bare loop has its batches in memory, in a process of its own; it is the limit as well.
"""

import argparse
import tempfile
from collections.abc import Callable

import torch

from benchmarks.common import elsewhere, medians, result
from benchmarks.runs import MICRO_BATCH, SEQ_LEN, local_ray, pretrain
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
from raybert.train.step import train_step

GLOBAL_BATCH = 4


def bare_loop(uri: str, threads: int, count: int) -> Callable[[], float]:
    """The plan's own samples, built beforehand; tokens per second, the median of the second half of the steps."""
    import statistics
    import time

    import numpy as np

    torch.set_num_threads(threads)
    keep_freed_memory()
    device = torch.device("cpu")
    reader = SampleReader(open_shards(uri), seed=0)
    steps = [
        [
            to_torch(reader.build(np.arange(first, first + MICRO_BATCH)), device)
            for first in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH, MICRO_BATCH)
        ]
        for step in range(count)
    ]
    model = Bert(BertConfig())
    pretraining, adam = Pretraining(model), optimizer.build(model, **OPTIMIZER)
    dtype = pick_dtype("auto", device)

    def side() -> float:
        rates = []
        for step, parts in enumerate(steps):
            start = time.perf_counter()
            keys = {"seed": 0, "step": step, "first_micro_batch": 0, "global_batch": GLOBAL_BATCH}
            sums, norm = train_step(pretraining, adam, parts, lr=1e-4, grad_clip=1.0, dtype=dtype, **keys)
            sums.tolist(), norm.item()
            tokens = sum(int(part["attention_mask"].sum()) for part in parts)
            rates.append(tokens / (time.perf_counter() - start))
        return statistics.median(rates[count // 2 :])

    return side


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    runs = 0
    with tempfile.TemporaryDirectory() as folder, local_ray(folder) as shards:

        def ours() -> float:
            nonlocal runs
            runs += 1
            options = {"workers": 1, "threads": 1, "steps": arguments.steps, "global_batch": GLOBAL_BATCH}
            rate, waits = pretrain(shards, folder, f"run-{runs}", **options)
            print(f"run {runs}: {rate:.0f} tokens/s, waits {waits}", flush=True)
            return rate

        with elsewhere(bare_loop, shards.uri, 1, arguments.steps) as bare:
            first, second = medians(ours, bare, rounds=arguments.rounds)
    more = {"micro_batch": MICRO_BATCH, "seq_len": SEQ_LEN, "workers": 1, "steps": arguments.steps}
    result("overhead", first, second, second, "real tokens/s", **more)


if __name__ == "__main__":
    main()
