"""Training while the probe service works without a pause; beside it training while a plain process does the same work.

The trainer has a core to itself; the service, its probes and Ray's own processes share another one, as in a cluster
with cores to spare. The trainer steps on the plan's batches while checkpoints that it handed over before are probed, by
one kind of task after the other: `kinds` has the share of the undisturbed speed beside each, measured just before and
after it, and `ours` is the lowest of these shares of the limit.
The peer is training while a process without Ray probes one encoder again and again on that other core: what a busy
neighbour costs on this machine (memory, caches, hyper-threads), whoever it is. The limit is the undisturbed trainer.
What handing a checkpoint over takes from the trainer's process stands beside it, in CPU seconds (`hand_over`): a run
pays that once in `every.probe` steps, by the snapshot and the background writer that are used here as well.

Tokens are counted per second of CPU time of the trainer's process, all its threads included. Other programs of the
machine move to the trainer's core when the other one is busy, and take time from it that no service took; per second
of the clock that is seen too (`wall`, and `core`, the share of its core that the trainer got). Needs two cores and
Linux, which can pin threads.
"""

import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.common import result
from raybert import cluster
from raybert.data.reader import iter_batches
from raybert.data.text.prepare import prepare
from raybert.encode.encoders import RaybertEncoder
from raybert.model import optimizer
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.losses import Pretraining
from raybert.model.precision import pick_dtype
from raybert.model.sizes import SIZES
from raybert.probe import kinds
from raybert.probe.baselines import Cache
from raybert.probe.evaluate import evaluate
from raybert.probe.evaluate import prepare as prepare_texts
from raybert.probe.kind import ProbeTask
from raybert.probe.service import client, queue
from raybert.probe.tasks import load_task, parse_task
from raybert.probe.texts import load_texts
from raybert.train import checkpoint
from raybert.train.step import train_step

SIZE, T, BATCH = "tiny", 128, 16
AHEAD = 4  # checkpoints that are queued before a measurement: more than are probed in it
AHEAD_COSTLY = 2  # of a kind whose probes take longer than a measurement
ROUNDS, PHASE = 5, 3.0  # measurements beside each kind, and seconds of each
WORDS = 60  # of a text of a pair


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the clock, and per second of the process's CPU time."""

    wall: float
    cpu: float


class Trainer:
    """Training of one worker, in this process and on one thread."""

    def __init__(self, shards: str) -> None:
        config = BertConfig(**SIZES[SIZE], max_position_embeddings=T)
        self.model = Pretraining(Bert(config))
        self.optimizer = optimizer.build(self.model.bert, lr=1e-4, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-6)
        self._batches: Iterator[dict[str, Any]] = iter_batches(shards, seed=0, global_batch_size=BATCH)
        self._dtype, self._steps = pick_dtype("auto", torch.device("cpu")), itertools.count()

    def speed(self, seconds: float) -> Speed:
        """Step for so many seconds."""
        start, used, tokens = time.perf_counter(), time.process_time(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            batch = {name: torch.from_numpy(values) for name, values in next(self._batches).items() if name != "index"}
            where = {"seed": 0, "step": next(self._steps), "first_micro_batch": 0, "global_batch": BATCH}
            train_step(self.model, self.optimizer, [batch], lr=1e-4, grad_clip=1.0, dtype=self._dtype, **where)
            tokens += int(batch["attention_mask"].sum())
        return Speed(tokens / elapsed, tokens / (time.process_time() - used))


class Checkpoints:
    """The trainer's weights on their way to the probe service."""

    def __init__(self, trainer: Trainer, folder: str, task: ProbeTask) -> None:
        self.run, self._root, self._trainer = f"{folder}/{task.kind}", folder, trainer
        self._task = task
        self._ahead = AHEAD_COSTLY if kinds.of_task(task).costly else AHEAD
        self._writer = checkpoint.BackgroundWriter()
        self._step = 0
        self.seconds: list[float] = []  # of CPU time that each hand-over took, the trainer's thread and the writer's

    def submit(self) -> None:
        start = time.thread_time()
        snap = checkpoint.snapshot(self._trainer.model)
        self._writer.submit(partial(self._hand_over, snap, self._step, time.thread_time() - start))
        self._step += 1

    def _hand_over(self, snap: checkpoint.Snapshot, step: int, seconds: float) -> None:
        start = time.thread_time()
        request = queue.Request(self.run, step, (self._task,), positions=T, cpus=cluster.SMALL_SHARE, max_waiting=20)
        checkpoint.write(snap, request.weights)
        queue.add(request)
        client.announce(self.run, self._root)
        self.seconds.append(seconds + time.thread_time() - start)

    def fill(self) -> None:
        """Have enough queued for a measurement, and nothing more to hand over."""
        while self._step - len(queue.records(self.run)) < self._ahead:
            self.submit()
        self.drain()

    def drain(self) -> None:
        """Return when all that was submitted is queued."""
        self._writer.drain()

    def wait(self) -> None:
        client.wait(self.run, self._root, timeout=240)

    def running(self) -> bool:
        probes = (probe for status in client.statuses() for run in status["runs"] for probe in run["running"])
        return any(probe["seconds"] is not None for probe in probes)


def tasks(folder: str, shards: str) -> list[ProbeTask]:
    """A task of each kind, of BBC News; a pair is two parts of an article, and its score the number of the topic."""
    texts = load_texts(load_task("bbc_news"))
    lines = []
    for text, label in zip(texts.texts, texts.labels, strict=True):
        words = str(text).split()
        first, second = " ".join(words[:WORDS]), " ".join(words[WORDS : 2 * WORDS])
        if second:
            lines.append(json.dumps({"text1": first, "text2": second, "label": float(label)}))
    pairs = Path(folder, "pairs.jsonl")
    pairs.write_text("\n".join(lines))
    labelled = {"train": "embedded://bbc_news", "text": "text", "label": "label", "seed": 0, "max_tokens": T}
    trees = [
        {**labelled, "n_train": 1500, "n_test": 600},
        {"kind": "similarity", "test": str(pairs)},
        {"kind": "retrieval", "pairs": str(pairs), "text": ["text1", "text2"]},
        {"kind": "neighbours", "shards": shards},
        {"kind": "finetune", **labelled, "n_train": 160, "n_test": 100, "epochs": 1},
    ]
    return [parse_task({"name": tree.get("kind", kinds.DEFAULT), **tree}, "the benchmark") for tree in trees]


def probe_for_ever(core: int, ready: Connection) -> None:
    """The control: a probe's work in a plain process, as modest as the service's."""
    os.sched_setaffinity(0, {core})
    os.setpriority(os.PRIO_PROCESS, 0, 10)
    torch.set_num_threads(1)
    encoder = RaybertEncoder(Bert(BertConfig(**SIZES[SIZE], max_position_embeddings=T)))
    with tempfile.TemporaryDirectory() as folder:
        material, cache = prepare_texts(load_task("bbc_news"), encoder.tokenize, T), Cache(folder)
        evaluate(encoder, material, cache)
        ready.send(None)
        while True:
            evaluate(encoder, material, cache)


@contextmanager
def control(core: int) -> Iterator[Callable[[bool], None]]:
    """A function that lets the control run, or holds it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=probe_for_ever, args=(core, there), daemon=True)
    process.start()
    here.recv()

    def run(go: bool) -> None:
        os.kill(process.pid or 0, signal.SIGCONT if go else signal.SIGSTOP)

    run(False)
    try:
        yield run
    finally:
        process.kill()


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed: one for the trainer, one for the probes")
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {cores[1]})  # Ray's processes inherit it
    cluster.connect()
    with tempfile.TemporaryDirectory() as folder, control(cores[1]) as let_control_run:
        shards = prepare(["embedded://bbc_news"], f"{folder}/shards", seq_len=T, validation_fraction=0.2).uri
        trainer = Trainer(shards)
        handed = {task.kind: Checkpoints(trainer, folder, task) for task in tasks(folder, shards)}
        for checkpoints in handed.values():  # one each, so that texts and baselines are known before anything is timed
            checkpoints.submit()
            checkpoints.drain()
        for checkpoints in handed.values():
            checkpoints.wait()
        _pin(cores[0])
        trainer.speed(PHASE)  # warm-up

        def idle() -> Speed:
            return trainer.speed(PHASE)

        def beside_control() -> Speed:
            let_control_run(True)
            try:
                return trainer.speed(PHASE)
            finally:
                let_control_run(False)

        def busy(checkpoints: Checkpoints) -> Speed:
            checkpoints.fill()
            while not checkpoints.running():
                time.sleep(0.1)
            return trainer.speed(PHASE)

        found: dict[str, list[Speed]] = {"idle": [], "control": [], **{kind: [] for kind in handed}}
        for _ in range(ROUNDS):
            found["idle"].append(idle())
            found["control"].append(beside_control())
        of_control = _median_cpu(found["control"]) / _median_cpu(found["idle"])
        of_idle = {}
        for kind, checkpoints in handed.items():
            # The service is not waited for between its measurements: that would take longer than they do.
            found[kind] = [busy(checkpoints) for _ in range(ROUNDS)]
            checkpoints.wait()
            found["idle"] += [idle() for _ in range(ROUNDS)]
            # A core's speed drifts, so each kind has its own undisturbed speed beside it.
            of_idle[kind] = _median_cpu(found[kind]) / _median_cpu(found["idle"][-2 * ROUNDS :])
        probes = {kind: len(queue.records(checkpoints.run)) - 1 for kind, checkpoints in handed.items()}
        hand_over = statistics.median(second for checkpoints in handed.values() for second in checkpoints.seconds)
    wall, cpu, core = (
        {name: statistics.median(map(figure, speeds)) for name, speeds in found.items()}
        for figure in (attrgetter("wall"), attrgetter("cpu"), lambda speed: speed.wall / speed.cpu)
    )
    more = {"kinds": of_idle, "wall": wall, "core": core, "probes": probes, "hand_over": hand_over, "target": 0.97}
    unit = "tokens per CPU second"
    ours, peer = (share * cpu["idle"] for share in (min(of_idle.values()), of_control))
    result("interference", ours, peer, cpu["idle"], unit, size=SIZE, seq_len=T, **more)
    ray.shutdown()


def _median_cpu(speeds: list[Speed]) -> float:
    return statistics.median(speed.cpu for speed in speeds)


def _pin(core: int) -> None:
    """Move every thread of this process to a core."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


if __name__ == "__main__":
    main()
