"""A rank's side of the hang watch: a thread that tells how far the training thread is."""

import os
import sys
import threading
import time
import traceback
import uuid
from typing import Any, Protocol

import ray
import torch
import torch.distributed as dist

from raybert.train.recovery.watchdog import BEAT, HangWatch


class Progress(Protocol):
    """How far the training thread is. `progress` grows whenever anything was done, `phase` says what it is at."""

    step: int
    progress: int
    phase: str


class Pulse:
    """Starts the watch on rank 0 and finds it on the others; every rank has to make one, in its training thread."""

    def __init__(
        self,
        run_uri: str,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        clock: Progress,
        factor: float,
        least: float,
        patience: float,
    ) -> None:
        self._rank, self._clock, self._least = rank, clock, least
        self._watched = threading.get_ident()
        name = [f"raybert-hang-watch-{uuid.uuid4().hex}"]
        actor: Any = ray.remote(num_cpus=0)(HangWatch)
        if rank == 0:
            self._watch = actor.options(name=name[0]).remote(run_uri, factor, least, patience)
        if world_size > 1:
            dist.broadcast_object_list(name, device=device)
        if rank != 0:
            self._watch = ray.get_actor(name[0])
        self._node = ray.get_runtime_context().get_node_id()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        progress, since = -1, time.monotonic()
        while not self._stop.wait(BEAT):
            clock, now = self._clock, time.monotonic()
            if clock.progress != progress:
                progress, since = clock.progress, now
            frame = sys._current_frames().get(self._watched) if now - since > self._least / 2 else None
            stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
            try:
                self._watch.beat.remote(self._rank, self._node, os.getpid(), clock.step, progress, clock.phase, stack)
            except Exception:
                return  # the watch is gone, and rank 0 with it: Ray Train restarts the group

    def close(self) -> None:
        """Take the rank off the watch; calling it twice is harmless."""
        self._stop.set()
        self._thread.join()
        self._watch.leave.remote(self._rank)
