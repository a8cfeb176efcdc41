"""What the benchmarks share: the machine's description, alternating runs, the last line."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def machine() -> str:
    """CPU model, cores and GPUs, in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores of {model}{', ' + ', '.join(gpus) if gpus else ''}"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(ours: Callable[[], float], peer: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Medians of both sides, measured in turn so that a busy moment of the machine hits both."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        found[0].append(ours())
        found[1].append(peer())
    return statistics.median(found[0]), statistics.median(found[1])


def result(name: str, ours: float, peer: float, limit: float, unit: str, **more: Any) -> None:
    """Print the last line. `ratio` and `share_of_limit` are ours / peer and ours / limit."""
    line = {
        "name": name,
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer,
        "limit": limit,
        "share_of_limit": ours / limit,
        "unit": unit,
        "machine": machine(),
        **more,
    }
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}))
