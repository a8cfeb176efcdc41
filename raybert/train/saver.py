"""What a run leaves behind as it goes: checkpoints, the best weights, and weights for the probe service.

Only the copy into memory is on the way of the step; files are written and uploaded behind it.
"""

import math
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import nn

from raybert import storage
from raybert.config import Config
from raybert.probe.service import client, queue
from raybert.probe.tasks import ProbeTask
from raybert.storage.retry import patiently
from raybert.telemetry import Gauges
from raybert.train import checkpoint as checkpoints
from raybert.train.clock import Clock
from raybert.train.recovery import faults
from raybert.train.recovery.committed import checkpoint_name

T = TypeVar("T")

UPLOADS = 2  # of full checkpoints: one under way, one that waits; a third makes the step wait


class Saver:
    """Every rank has one, since all report to Ray Train; rank 0's holds the weights and writes.

    `flush` is called before a checkpoint is committed. `saved` is the step of the newest checkpoint that was handed to
    Ray Train, 0 where there is none; it is committed before the group ends, unless an upload fails and the run with it.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tasks: list[ProbeTask],
        probe_cpus: float,
        rank: int,
        clock: Clock,
        restored: int,
        best: float,
        flush: Callable[[], None],
        gauges: Gauges | None,
    ) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.tasks, self.probe_cpus = tasks, probe_cpus
        self.clock, self.flush, self.gauges = clock, flush, gauges
        self.saved, self.best = restored, best
        self.writer = checkpoints.BackgroundWriter() if rank == 0 else None
        # Ray Train takes any number of uploads, each with a copy of the weights and the optimizer's state in memory.
        self.uploads = threading.BoundedSemaphore(UPLOADS)

    def save(self, events: set[str], record: dict[str, Any], *, tokens: int) -> None:
        """Snapshot, hand over to the background, and tell Ray Train, as far as each is due after the record's step."""
        step = record["step"]
        validation_loss = record["validation"]["loss"] if "validation" in record else math.inf
        is_best = self.config.checkpoint.keep_best and validation_loss < self.best
        self.best = min(self.best, validation_loss)
        snap = None
        if self.writer is not None and (events & {"checkpoint", "probe"} or is_best):
            with self.clock.waiting("checkpoint"):
                counters = {
                    "step": step,
                    "elapsed_seconds": record["elapsed_seconds"],
                    "best_validation_loss": self.best,
                }
                full = "checkpoint" in events
                if full:
                    self.uploads.acquire()
                snap = checkpoints.snapshot(self.model, self.optimizer if full else None, **counters)
                if "probe" in events:
                    self.writer.submit(partial(self._submit_probe, snap, step))
                if is_best:
                    best = checkpoints.Snapshot(snap.weights, snap.config, None)
                    uri = storage.join(self.config.run_uri, "checkpoints", "best")
                    written = partial(checkpoints.write, best, uri)
                    self.writer.submit(partial(self._patiently, written, "writing the best weights"))
        if events & {"checkpoint", "validation"}:
            metrics = {"step": step, "tokens": tokens}
            if "loss" in record:
                metrics["loss"] = record["loss"]
            if "validation" in record:
                metrics["validation_loss"] = validation_loss
            with self.clock.waiting("report"):
                if "checkpoint" in events:
                    self._commit(metrics, snap, step)
                else:
                    ray.train.report(metrics)

    def close(self) -> None:
        """Wait until all that was handed over is written, but for the last checkpoint, which Ray Train waits for."""
        if self.writer is not None:
            self.writer.close()

    def _patiently(self, action: Callable[[], T], what: str) -> T:
        return patiently(action, f"{what} of {self.config.run_uri}", seconds=self.config.run.patience)

    def _commit(self, metrics: dict[str, float], snap: checkpoints.Snapshot | None, step: int) -> None:
        """Tell the controller; with a snapshot, its upload goes on in Ray Train's own thread."""
        name = checkpoint_name(step)

        def upload(_: Checkpoint, directory: str) -> Checkpoint:
            try:
                return write(directory)
            finally:
                self.uploads.release()

        def write(directory: str) -> Checkpoint:
            assert snap is not None
            uri, start = storage.join(self.config.run_uri, directory), time.monotonic()
            # A run that goes on from this checkpoint must find what was noted until here, and has no second chance to
            # queue a probe of this step or to keep its weights as the best.
            if self.writer is not None:
                self.writer.drain()
            self.flush()
            size = self._patiently(partial(checkpoints.write, snap, uri), f"writing {directory}")
            if self.gauges is not None:
                self.gauges.set({"checkpoint_bytes": size, "checkpoint_seconds": time.monotonic() - start})
            return Checkpoint(storage.arrow_uri(uri))

        ray.train.report(
            metrics,
            # The directory is a formality: `upload` writes the snapshot itself.
            checkpoint=Checkpoint.from_directory(tempfile.mkdtemp(prefix="raybert-")) if snap else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=upload,
        )
        self.saved = step

    def _submit_probe(self, snap: checkpoints.Snapshot, step: int) -> None:
        """Put the weights where retention never reaches and queue the step for the probe service.

        Where that cannot be done, it is noted: training does not end for a probe.
        """
        weights_alone = checkpoints.Snapshot(snap.weights, snap.config, None)
        run_uri = self.config.run_uri
        submit = partial(
            client.submit,
            run_uri,
            self.config.run.storage,
            step,
            self.tasks,
            lambda uri: checkpoints.write(weights_alone, uri),
            positions=snap.config.max_position_embeddings,
            cpus=self.probe_cpus,
            max_waiting=self.config.probe.max_waiting,
            gpus=self.config.probe.gpus,
        )
        try:
            self._patiently(submit, "queueing a probe")
        except Exception as error:
            reason = f"The checkpoint could not be queued for its probe ({type(error).__name__}: {error})."
            faults.note(run_uri, "probe", f"step {step}: {reason}", step=step)
            with suppress(Exception):  # the note says it, too
                queue.skip(run_uri, step, self.tasks, reason)
