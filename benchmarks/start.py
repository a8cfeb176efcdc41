"""Seconds from the command line to the end of the first step: cold (the command starts a Ray) and warm (one runs).

No other tool has these parts: `peer` is the cold start, and the limit what a bare process needs to import torch.
Phases: until the settings, shards and cluster are checked; until the workers have their first batch; the first step.
`token_vectors`: what model.embedding_init=spectral or whitened adds once for a shard set, here the corpus.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import yaml

from benchmarks import spectral
from benchmarks.common import medians, result, seconds
from raybert import cluster
from raybert.records import read_metrics
from raybert.spectral.recipe import Recipe
from tests.data import make_shards

ROUNDS = 3
STEPS = 2


def start(folder: Path, shards: str, number: int, address: str | None) -> dict[str, float]:
    """Run a tiny `raybert pretrain` and read its phases from what it prints and logs."""
    tree: dict[str, Any] = {
        "run": {"name": f"run-{number}", "storage": str(folder)},
        "data": {"shards": shards},
        "model": {"size": "tiny", "max_position_embeddings": 32},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 8},
        "schedule": {"warmup_steps": 1},
        "every": {"log": 1, "validation": 0, "probe": 0, "checkpoint": 0},
    }
    path = folder / f"{number}.yaml"
    path.write_text(yaml.safe_dump(tree))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    if address is not None:
        environment["RAY_ADDRESS"] = address
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "raybert.cli", "pretrain", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    checked = first = 0.0
    for line in process.stdout:
        if line.startswith("run ") and not checked:
            checked = time.perf_counter() - begun
        elif line.startswith("step") and not first:
            first = time.perf_counter() - begun
    if process.wait() or not first:
        raise RuntimeError(f"the run ended with {process.returncode}")
    records = [record for record in read_metrics(f"{folder}/run-{number}") if "loss" in record]
    step = records[0]["elapsed_seconds"]
    return {"total": first, "checked": checked, "workers": first - checked - step, "first_step": step}


def main() -> None:
    number = 0
    phases: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(f"{name}/shards").uri

        def cold() -> float:
            nonlocal number
            number += 1
            phases["cold"].append(start(folder, shards, number, None))
            return phases["cold"][-1]["total"]

        def warm() -> float:
            nonlocal number
            number += 1
            phases["warm"].append(start(folder, shards, number, ray.get_runtime_context().gcs_address))
            return phases["warm"][-1]["total"]

        command = [sys.executable, "-c", "import torch"]
        second, limit = medians(cold, lambda: seconds(lambda: subprocess.run(command, check=True)), rounds=ROUNDS)
        # Not in turns: this Ray would run beside the cold starts.
        cluster.launch(2)
        try:
            # The first run starts Ray's worker processes; a median of three passes over it.
            (first,) = medians(warm, rounds=ROUNDS)
        finally:
            ray.shutdown()
        cluster.connect()  # one of its own, as a command does
        vectors, _, _ = spectral.ours(f"{name}/vectors", Recipe(0))
    more = {"cold": phases["cold"][-1], "warm": phases["warm"][-1], "token_vectors": vectors}
    result("start", first, second, limit, "s (less is better)", **more)


if __name__ == "__main__":
    main()
