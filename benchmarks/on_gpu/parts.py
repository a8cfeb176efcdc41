"""A part of `benchmarks.gpu`: what it is given, and how it answers."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import round_figures
from benchmarks.on_gpu import carried
from raybert.model.precision import pick_dtype


@dataclass(frozen=True)
class Order:
    """What a part is to do: where, with which data, and until when (`time.monotonic`)."""

    part: str
    device: torch.device
    out: Path
    data: Path
    deadline: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return pick_dtype("auto", self.device)

    def load(self) -> carried.Carried:
        return carried.read(self.data)

    def tell(self, **found: Any) -> None:
        """One line of the results, as it comes."""
        print(json.dumps(round_figures({"part": self.part, **found})), flush=True)

    def mark(self) -> torch.cuda.Event | None:
        """A place in what the device was given so far."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event | None = None) -> None:
        """Until the device has done all that it was given, or all before a mark."""
        if mark is not None:
            mark.synchronize()
        elif self.on_gpu:
            torch.cuda.synchronize(self.device)


def fresh(order: Order) -> None:
    """Nothing of what ran before is left: neither what was compiled nor its memory, and the peak begins here."""
    torch._dynamo.reset()
    gc.collect()
    if order.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(order.device)


def timed(work: Callable[[], object], order: Order) -> float:
    """Seconds of the work on the device."""
    order.wait()
    start = time.perf_counter()
    work()
    order.wait()
    return time.perf_counter() - start
