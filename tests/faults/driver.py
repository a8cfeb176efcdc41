"""Runs of the real command line on a cluster, as subprocesses that can be watched and killed."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raybert import storage
from raybert.config import from_mapping
from raybert.data.reader import iter_batches
from raybert.records import read_metrics
from raybert.train import ledger
from raybert.train.recovery import faults
from tests.clusters import Cluster
from tests.gcs import Emulator
from tests.plain import train_plainly
from tests.waiting import Sign, wait_for, wait_for_end

BATCH, MICRO, SEED, SEQ_LEN = 12, 2, 3, 32
# So that a worker that may take no more memory than it has finds that out in its next step.
EVERY_TENSOR_FROM_THE_KERNEL = {
    "MALLOC_MMAP_MAX_": "65536",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_TOP_PAD_": "0",
}
STRETCH = 45  # steps that a fault has to itself, with three checkpoints


def settings(place: str, shards: str, name: str, **sections: Any) -> str:
    """The YAML of a small run, which can be spread over 1, 2, 3 or 6 workers."""
    tree: dict[str, Any] = {
        "run": {"name": name, "storage": place},
        "data": {"shards": shards, "seed": SEED},
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": SEQ_LEN,
        },
        "train": {"steps": STRETCH, "global_batch": BATCH, "micro_batch": MICRO, "dtype": "float32", "workers": 2},
        "schedule": {"warmup_steps": 20},
        "every": {"log": 1, "validation": 0, "probe": 0, "checkpoint": 15},
        "checkpoint": {"keep_last": 3, "keep_best": False},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return from_mapping(tree).to_yaml()


@dataclass
class Driver:
    """`raybert pretrain` as a process of its own."""

    cluster: Cluster
    uri: str
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    stretch: int = 0  # the first step of the stretch of the fault that is next
    gcs: Emulator | None = None  # of the bucket that the run is in
    begun: float = field(default_factory=time.time)

    @classmethod
    def of(
        cls, cluster: Cluster, folder: Path, shards: str, name: str, *, gcs: Emulator | None = None, **sections: Any
    ) -> "Driver":
        """Write the run's YAML and start it."""
        path = folder / f"{name}.yaml"
        place = sections.get("run", {}).get("storage", str(folder))
        path.write_text(settings(place, shards, name, **sections))
        driver = cls(cluster, f"{place}/{name}", folder / f"{name}.log", gcs=gcs)
        driver.start(str(path))
        return driver

    def start(self, *arguments: str) -> None:
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raybert.cli", "pretrain", *arguments],
                env={
                    **self.cluster.environment,
                    **EVERY_TENSOR_FROM_THE_KERNEL,
                    **self.environment,
                },
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def kill(self, sign: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(sign)
        self.process.wait()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def step(self) -> int:
        """The newest step in the log; of a run in a bucket, in rank 0's own copy, which is uploaded now and then."""
        if not storage.is_remote(self.uri):
            return max((record["step"] for record in read_metrics(self.uri)), default=0)
        newest = 0
        for path in self.cluster.temporary.glob("raybert-metrics-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime > self.begun:
                    newest = max([newest, *map(int, re.findall(r'^{"step": (\d+)', path.read_text(), re.MULTILINE))])
        return newest

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: self.step() >= step, pause=0.02)

    def wait_for(self, what: str, found: Callable[[], Any], pause: float = 0.01) -> Any:
        """Poll until `found()` is true, and return it."""

        def found_or_ended() -> Any:
            assert self.process is not None
            ended = self.process.poll() is not None
            result = found()
            assert result or not ended, f"the driver ended before {what}:\n{self.said[-4000:]}"
            return result

        pause = max(pause, 0.1) if self.gcs else pause
        return wait_for(what, found_or_ended, signs=self.signs, told=self.state, pause=pause)

    @property
    def signs(self) -> list[Sign]:
        """Where its life can be seen: what it prints, its steps, what it writes."""
        return [self.log, self.step, *([] if storage.is_remote(self.uri) else [self.uri])]

    def state(self) -> str:
        return f"{self.said[-4000:]}\n{self.cluster.state()}"

    def wait(self) -> int:
        """Wait until the run has ended, and return its exit code."""
        assert self.process is not None
        return wait_for_end(self.process, "the run", signs=self.signs, told=self.state)

    def wait_for_fault(self, kind: str, known: int) -> dict[str, Any]:
        """The newest fault of a kind, when there are more than `known` of it."""
        return self.wait_for(f"the fault {kind} in the list", lambda: self.faults(kind)[known:])[-1]

    def faults(self, kind: str) -> list[dict[str, Any]]:
        return [fault for fault in faults.read_faults(self.uri)[0] if fault["kind"] == kind]


def recomputed_digests(shards: str, steps: int) -> list[int]:
    """The ledger's digests from the widened batches, as docs/determinism.md tells another reader to compute them."""
    import hashlib

    found = []
    for _, batch in zip(range(steps), iter_batches(shards, seed=SEED, global_batch_size=BATCH), strict=False):
        total = 0
        for i in range(BATCH):
            real = batch["attention_mask"][i]
            length = int(real.sum())
            cut = length - int(batch["token_type_ids"][i].sum())
            labels = np.where(batch["masked_labels"][i] < 0, 50260, batch["masked_labels"][i])
            content = (
                batch["index"][i].astype("<i8").tobytes()
                + batch["next_sentence_label"][i].astype("<i1").tobytes()
                + np.array([cut, length], "<i4").tobytes()
                + batch["input_ids"][i].astype("<u2").tobytes()
                + batch["masked_positions"][i].astype("<i4").tobytes()
                + labels.astype("<u2").tobytes()
            )
            total += int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        found.append(total % 2**64)
    return found


def plain_losses(shards: str, steps: int, total_steps: int | None = None) -> np.ndarray:
    """(steps, 2): step and loss of an undisturbed run in this process: one replica, no Ray, no restart.

    ``total_steps``: those of the schedule, where it is longer than what is trained.
    """
    tree = yaml.safe_load(settings("/nowhere", shards, "plain", train={"steps": total_steps or steps}))
    found = train_plainly(from_mapping(tree), steps)
    return np.array([[step + 1, means["loss"]] for step, means in enumerate(found)])


def losses(uri: str) -> np.ndarray:
    return np.array([[record["step"], record["loss"]] for record in read_metrics(uri) if "loss" in record])


def assert_undisturbed(driver: Driver, digests: list[int], reference: np.ndarray | None = None) -> ledger.Account:
    """The run ended well, and trained on what an undisturbed one trains on, with the same losses."""
    assert driver.wait() == 0, driver.said[-4000:]
    account = ledger.read_account(driver.uri)
    assert account.digests.tolist() == digests
    if reference is not None:
        assert_same_losses(driver.uri, reference)
    return account


def assert_same_losses(uri: str, reference: np.ndarray) -> None:
    """Of the reference's steps and no others, to rounding."""
    found = losses(uri)
    assert found[:, 0].tolist() == reference[:, 0].tolist()
    np.testing.assert_allclose(found[:, 1], reference[:, 1], rtol=5e-4)


def pick(rng: random.Random, pids: list[int]) -> int:
    assert pids, "there is no such process to kill"
    return rng.choice(pids)


def kill(pid: int, sign: int = signal.SIGKILL) -> None:
    os.kill(pid, sign)
