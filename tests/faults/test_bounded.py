"""A long run holds steady: memory of every process, open files, the object store and the temporary directory."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.clusters import cluster as ray_nodes
from tests.data import make_shards
from tests.faults.driver import SEQ_LEN, Driver
from tests.processes import descendants

STEPS = 10_000
MB = 2**20

pytestmark = [
    pytest.mark.timeout(6 * 3600),
    pytest.mark.skipif("RAYBERT_SOAK" not in os.environ, reason="`make soak` does this: it takes a quarter of an hour"),
]


def resident(pid: int, *, shared: bool = False) -> int:
    """Bytes of a process in memory: its own, or those that it shares with others (of a raylet, the object store)."""
    _, whole, common, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (common if shared else whole - common) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def tree_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            continue
    return total


def test_ten_thousand_steps_grow_nothing(tmp_path):
    shards = make_shards(str(tmp_path / "shards"), seq_len=SEQ_LEN, rows=700).uri
    sizes: dict[str, list[tuple[int, float]]] = {}
    with ray_nodes(3) as cluster:
        every = {"checkpoint": 250, "validation": 500, "log": 10}
        driver = Driver.of(cluster, tmp_path, shards, "run", train={"steps": STEPS}, every=every)
        assert driver.process is not None
        while driver.process.poll() is None:
            step = driver.step()
            pids = descendants(cluster.nodes[0].process.pid) | {driver.process.pid: "driver"}
            pids = {pid: title for pid, title in pids.items() if title}  # one that just ends has none
            for pid, title in pids.items():
                name = f"{title.split()[0].rsplit('/', 1)[-1][:30]} {pid}"
                try:
                    sizes.setdefault(f"memory of {name}", []).append((step, resident(pid) / MB))
                    sizes.setdefault(f"files of {name}", []).append((step, open_files(pid)))
                except OSError:
                    continue
            raylet = next(pid for pid, title in pids.items() if "raylet/raylet" in title.split()[0])
            sizes.setdefault("object store", []).append((step, resident(raylet, shared=True) / MB))
            sizes.setdefault("temporary directory", []).append((step, tree_bytes(cluster.folder) / MB))
            time.sleep(2)
        assert driver.wait() == 0, driver.said[-4000:]

    grown = {}
    for name, points in sizes.items():
        settled = np.array([point for point in points if point[0] > STEPS * 0.3])
        if len(settled) < 20 or np.ptp(settled[:, 0]) < STEPS * 0.4:
            continue
        slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * 10_000
        print(f"{name:60} {settled[0, 1]:10.1f} -> {settled[-1, 1]:10.1f}   {slope:+8.2f} in 10,000 steps")
        # Ray's logs in the temporary directory grow by a line a report.
        limit = 10.0 if name.startswith("files") else 64.0
        if slope > limit:
            grown[name] = slope
    assert not grown
