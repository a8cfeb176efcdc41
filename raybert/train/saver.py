"""What a run leaves behind as it goes: checkpoints, the best weights, and weights for the probe service.

Only the copy into memory is on the way of the step, on a GPU not even that; files are written and uploaded behind it.
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
from raybert.config_sections import VALIDATION_LOSS
from raybert.probe.kind import ProbeTask
from raybert.probe.service import best as best_weights
from raybert.probe.service import client, queue
from raybert.storage.retry import retry
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
        if rank == 0 and self._best_by == VALIDATION_LOSS and best_weights.forget(config.run_uri):
            self.best = math.inf  # the weights that are kept are not those of the lowest loss
        self.gate = checkpoints.Gate(optimizer)
        self.writer = checkpoints.BackgroundWriter() if rank == 0 else None
        # Ray Train takes any number of uploads, each with a copy of the weights and the optimizer's state in memory.
        self.uploads = threading.BoundedSemaphore(UPLOADS)

    def probe_start(self) -> None:
        """Queue a probe of the run's start, once, unless its weights are those of any untrained encoder."""
        if self.writer is None or not self.tasks or self.config.model.begins_random:
            return
        with self.clock.waiting("checkpoint"):
            weights = checkpoints.snapshot(self.model)
            self.gate.hold(weights)
            self.writer.submit(partial(self._request_probe, weights, 0))

    def save(self, events: set[str], record: dict[str, Any], *, tokens: int) -> None:
        """Snapshot, hand over to the background, and tell Ray Train, as far as each is due after the record's step."""
        step = record["step"]
        is_best = self._update_best(record)
        snap = None
        if self.writer is not None and (events & {"checkpoint", "probe"} or is_best):
            with self.clock.waiting("checkpoint"):
                snap = self._snapshot(record, full="checkpoint" in events)
                self.gate.hold(snap)
                if "probe" in events:
                    self.writer.submit(partial(self._request_probe, snap.weights_alone(), step))
                if is_best:
                    self.writer.submit(partial(self._write_best, snap.weights_alone()))
        if events & {"checkpoint", "validation"}:
            metrics = {"step": step, "tokens": tokens}
            if "loss" in record:
                metrics["loss"] = record["loss"]
            if "validation" in record:
                metrics["validation_loss"] = record["validation"]["loss"]
            with self.clock.waiting("report"):
                if "checkpoint" in events:
                    self._commit(metrics, snap, step)
                else:
                    ray.train.report(metrics)

    def _update_best(self, record: dict[str, Any]) -> bool:
        """Note the validation loss, and return whether the weights are to be kept as the best so far."""
        if "validation" not in record:
            return False
        loss, before = record["validation"]["loss"], self.best
        self.best = min(before, loss)
        return self._best_by == VALIDATION_LOSS and loss < before

    @property
    def _best_by(self) -> str:
        """The metric whose best weights are kept. Where a probe measures it, its service keeps them."""
        return self.config.checkpoint.best if self.config.checkpoint.keep_best else ""

    def _snapshot(self, record: dict[str, Any], *, full: bool) -> checkpoints.Snapshot:
        """Copy the weights into memory and, for a full checkpoint, what else it needs, as soon as there is room."""
        if full:
            self.uploads.acquire()
        return checkpoints.snapshot(
            self.model,
            self.optimizer if full else None,
            step=record["step"],
            elapsed_seconds=record["elapsed_seconds"],
            best_validation_loss=self.best,
        )

    def _write_best(self, weights: checkpoints.Snapshot) -> None:
        uri = storage.join(self.config.run_uri, "checkpoints", "best")
        self._retry(partial(checkpoints.write, weights, uri), "writing the best weights")

    def close(self) -> None:
        """Wait until all that was handed over is written, but for the last checkpoint, which Ray Train waits for."""
        if self.writer is not None:
            self.writer.close()

    def _retry(self, action: Callable[[], T], what: str) -> T:
        return retry(action, f"{what} of {self.config.run_uri}", seconds=self.config.run.patience)

    def _commit(self, metrics: dict[str, float], snap: checkpoints.Snapshot | None, step: int) -> None:
        """Tell the controller; with a snapshot, its upload goes on in Ray Train's own thread."""

        def upload(_: Checkpoint, directory: str) -> Checkpoint:
            assert snap is not None
            try:
                return self._upload(snap, directory)
            finally:
                self.uploads.release()

        ray.train.report(
            metrics,
            # The directory is a formality: `upload` writes the snapshot itself.
            checkpoint=Checkpoint.from_directory(tempfile.mkdtemp(prefix="raybert-")) if snap else None,
            checkpoint_dir_name=checkpoint_name(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=upload,
        )
        self.saved = step

    def _upload(self, snap: checkpoints.Snapshot, directory: str) -> Checkpoint:
        uri, start = storage.join(self.config.run_uri, directory), time.monotonic()
        # A run that goes on from this checkpoint must find what was noted until here, and has no second chance to
        # queue a probe of this step or to keep its weights as the best.
        if self.writer is not None:
            self.writer.drain()
        self.flush()
        size = self._retry(partial(checkpoints.write, snap, uri), f"writing {directory}")
        if self.gauges is not None:
            self.gauges.set({"checkpoint_bytes": size, "checkpoint_seconds": time.monotonic() - start})
        return Checkpoint(storage.arrow_uri(uri))

    def _request_probe(self, weights: checkpoints.Snapshot, step: int) -> None:
        """Queue the step for the probe service. Where that cannot be done, it is noted: a probe never ends training."""
        run_uri = self.config.run_uri
        request = queue.Request(
            run_uri,
            step,
            tuple(self.tasks),
            positions=weights.config.max_position_embeddings,
            cpus=self.probe_cpus,
            gpus=self.config.probe.gpus,
            workers=self.config.probe.workers,
            max_waiting=self.config.probe.max_waiting,
            tokenizer=weights.tokenizer.hash if weights.tokenizer else "",
            begins_random=self.config.model.begins_random,
            best=self._best_by if self._best_by != VALIDATION_LOSS else "",
        )
        try:
            self._retry(partial(self._queue_probe, request, weights), "queueing a probe")
        except Exception as error:
            reason = f"The checkpoint could not be queued for its probe ({type(error).__name__}: {error})."
            faults.note(run_uri, "probe", f"step {step}: {reason}", step=step)
            with suppress(Exception):  # the note says it, too
                queue.skip(run_uri, step, self.tasks, reason)

    def _queue_probe(self, request: queue.Request, weights: checkpoints.Snapshot) -> None:
        """Put the weights where retention never reaches, then the request into the queue, then tell the service."""
        if queue.new_tasks(request):
            checkpoints.write(weights, request.weights)
        if queue.add(request):
            client.announce(request.run_uri, self.config.run.storage)
