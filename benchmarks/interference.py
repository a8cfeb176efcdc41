"""Tokens per second of training while the probe service works without a pause; beside it the same, the service idle.

The trainer has a core to itself; the service, its probes and Ray's own processes share another one, as in a cluster
with cores to spare. The trainer does what a run's rank 0 does: it steps on the plan's batches and hands copies of its
weights to the service through the background writer. The limit is the undisturbed trainer. Needs two cores and Linux,
which can pin threads.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.common import alternate, result
from raybert import cluster
from raybert.data.prepare import prepare
from raybert.data.reader import iter_batches
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.losses import Pretraining
from raybert.model.sizes import SIZES
from raybert.probe import client, queue
from raybert.probe.tasks import load_task
from raybert.train import checkpoint, optimizer
from raybert.train.step import pick_dtype, train_step

SIZE, T, BATCH = "tiny", 128, 16
ROUNDS, PHASE = 4, 5.0  # pairs of measurements, and seconds of each


class Trainer:
    """Training of one worker, in this process and on one thread."""

    def __init__(self, shards: str) -> None:
        config = BertConfig(**SIZES[SIZE], max_position_embeddings=T)
        self.model = Pretraining(Bert(config))
        self.optimizer = optimizer.build(self.model.bert, lr=1e-4, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-6)
        self._batches: Iterator[dict[str, Any]] = iter_batches(shards, seed=0, global_batch_size=BATCH)
        self._dtype, self._steps = pick_dtype("auto", torch.device("cpu")), itertools.count()

    def tokens_per_second(self, seconds: float, meanwhile: Callable[[], None]) -> float:
        """Step for so many seconds; `meanwhile` is called after each step and counts as training time."""
        start, tokens = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            batch = {name: torch.from_numpy(values) for name, values in next(self._batches).items() if name != "index"}
            where = {"seed": 0, "step": next(self._steps), "first_micro_batch": 0, "global_batch": BATCH}
            train_step(self.model, self.optimizer, [batch], lr=1e-4, grad_clip=1.0, dtype=self._dtype, **where)
            tokens += int(batch["attention_mask"].sum())
            meanwhile()
        return tokens / elapsed


class Checkpoints:
    """The trainer's weights on their way to the probe service: one checkpoint is probed and one waits."""

    def __init__(self, trainer: Trainer, folder: str) -> None:
        self.run, self._root, self._trainer = f"{folder}/run", folder, trainer
        self._task = load_task("bbc_news")
        self._writer = checkpoint.BackgroundWriter()
        self._step, self._looked = 0, 0.0

    def submit(self) -> None:
        snap = checkpoint.snapshot(self._trainer.model)
        self._writer.submit(partial(self._hand_over, snap, self._step))
        self._step += 1

    def _hand_over(self, snap: checkpoint.Snapshot, step: int) -> None:
        client.submit(
            self.run,
            self._root,
            step,
            [self._task],
            lambda uri: checkpoint.write(snap, uri),
            positions=T,
            cpus=cluster.SMALL_SHARE,
            max_waiting=20,
        )

    def keep_busy(self) -> None:
        if time.monotonic() - self._looked > 0.5:
            self._looked = time.monotonic()
            if self._step - len(queue.records(self.run)) < 2:
                self.submit()

    def wait(self) -> None:
        client.wait(self.run, self._root, timeout=60)

    def running(self) -> bool:
        return any(run["running"] for status in client.statuses() for run in status["runs"])


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed: one for the trainer, one for the probes")
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {cores[1]})  # Ray's processes inherit it
    cluster.connect()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(prepare(["embedded://bbc_news"], f"{folder}/shards", seq_len=T).uri)
        checkpoints = Checkpoints(trainer, folder)
        checkpoints.submit()  # the task's texts are read once, before anything is timed
        while not queue.records(checkpoints.run):
            time.sleep(0.2)
        checkpoints.wait()
        _pin(cores[0])
        trainer.tokens_per_second(PHASE, lambda: None)  # warm-up

        def idle() -> float:
            checkpoints.wait()
            return trainer.tokens_per_second(PHASE, lambda: None)

        def busy() -> float:
            checkpoints.submit()
            while not checkpoints.running():
                time.sleep(0.1)
            return trainer.tokens_per_second(PHASE, checkpoints.keep_busy)

        ours, peer = alternate(busy, idle, rounds=ROUNDS)
        checkpoints.wait()
        probes = len(queue.records(checkpoints.run)) - 1
    result("interference", ours, peer, peer, "tokens/s", size=SIZE, seq_len=T, probes=probes, target=0.97)
    ray.shutdown()


def _pin(core: int) -> None:
    """Move every thread of this process to a core."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


if __name__ == "__main__":
    main()
