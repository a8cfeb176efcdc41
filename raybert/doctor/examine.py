"""Finding out about a cluster: one small task looks at every node, and storage and dashboard are asked.

What is made of the facts is in `raybert.doctor.judge`.
"""

import os
import platform
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import pyarrow.fs
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybert import storage
from raybert.cluster import largest_resources
from raybert.config import Config
from raybert.data.shards import open_shards
from raybert.doctor import judge
from raybert.doctor.judge import PACKAGES, Line, NodeFacts
from raybert.errors import InputError, RunFailed, last_line
from raybert.probe.service.client import service_name
from raybert.ray_internals.core import dashboard_address

# Seconds for a node to start a process and answer.
PATIENCE = 120.0


def examine(config: Config | None) -> Iterator[Line]:
    """Look at the cluster that this process is connected to, one line at a time."""
    url = dashboard_address()
    url = url if not url or "://" in url else f"http://{url}"
    yield judge.dashboard(url, _status_without_token(url) if url else None)
    cpus, gpus = largest_resources()
    yield judge.resources(cpus, gpus, config)
    marker = _Marker(config)
    with marker:
        nodes, silent = _ask_nodes(config, marker)
    yield judge.nodes(nodes, silent, cpus)
    if not nodes:
        return
    yield from judge.versions(nodes)
    yield judge.clocks(nodes)
    yield judge.shared_memory(nodes)
    worker = None
    if config is not None:
        try:
            worker = judge.shares_of(cpus, gpus, config, config.train.worker_range[0]).worker
        except InputError:
            worker = None  # told above
    yield judge.threads(nodes, worker, config.train.worker_range[1] if config is not None else None)
    if config is None:
        return
    yield judge.storage("run.storage", config.run.storage, nodes)
    if config.data.shards:
        yield judge.storage("data.shards", config.data.shards, nodes)


def _status_without_token(url: str) -> int | None:
    """What the dashboard answers to a stranger; None when nothing does."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/api/version", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


class _Marker:
    """A small file in run.storage that the nodes look for: a path that they do not share is found out so."""

    def __init__(self, config: Config | None) -> None:
        self.uri = storage.join(config.run.storage, f".raybert-doctor-{uuid.uuid4().hex[:12]}") if config else ""
        self.fault = ""

    def __enter__(self) -> None:
        if self.uri:
            try:
                storage.require_writable(self.uri.rpartition("/")[0])
                storage.write_bytes(self.uri, b"raybert")
            except (InputError, RunFailed, OSError) as error:
                self.fault = str(error)

    def __exit__(self, *_: object) -> None:
        if self.uri and not self.fault:
            storage.remove(self.uri)


def _ask_nodes(config: Config | None, marker: _Marker) -> tuple[list[NodeFacts], dict[str, str]]:
    """(facts of the nodes that answered, reasons of those that did not)."""

    def on(node: Mapping[str, Any], function: Any) -> Any:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=place)

    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    shards = config.data.shards if config is not None else ""
    refs = {key: on(node, _look).remote(marker.uri, marker.fault, shards) for key, node in alive.items()}
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=PATIENCE)
    addresses = Counter(node["NodeManagerAddress"] for node in alive.values())
    found, silent = [], {}
    for key, node in alive.items():
        name, resources = node["NodeManagerAddress"], node["Resources"]
        if addresses[name] > 1:
            name = f"{name}/{key[:8]}"  # several nodes on one machine
        try:
            facts = ray.get(refs[key], timeout=0)
            skew, error = _skew(on(node, _now))
        except Exception as reason:  # whatever kept it from running there
            timed_out = isinstance(reason, ray.exceptions.GetTimeoutError)
            silent[name] = f"no answer in {PATIENCE:.0f} s" if timed_out else last_line(reason)
            continue
        capacity = {
            "cpus": resources.get("CPU", 0.0),
            "gpus": resources.get("GPU", 0.0),
            "object_store": resources.get("object_store_memory", 0.0),
        }
        found.append(NodeFacts(name=name, skew=skew, skew_error=error, **capacity, **facts))
    return found, silent


def _now() -> float:
    return time.time()


def _skew(clock: Any) -> tuple[float, float]:
    """(seconds that a node's clock is ahead, and how far off that may be), from the quickest of a few questions."""
    answers = []
    for _ in range(4):
        before = time.time()
        theirs = ray.get(clock.remote(), timeout=PATIENCE)
        after = time.time()
        answers.append(((after - before) / 2, theirs - (before + after) / 2))
    error, skew = min(answers)
    return skew, error


def _look(marker: str, marker_fault: str, shards: str) -> dict[str, Any]:
    """The part of `NodeFacts` that only the node itself can say; runs there."""
    faults = {}
    if marker and (fault := marker_fault or _storage_fault(marker)):
        faults["run.storage"] = fault
    if shards:
        try:
            open_shards(shards)
        except (InputError, RunFailed, OSError) as error:
            faults["data.shards"] = str(error)
    code = service_name().rpartition("-")[2]
    versions = {name: version(name) for name in PACKAGES}
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "versions": {"python": platform.python_version(), **versions, "raybert": f"{versions['raybert']} ({code})"},
        "shared_memory": shm.f_frsize * shm.f_blocks if shm else 0,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or 1),
        "storage_faults": faults,
    }


def _storage_fault(marker: str) -> str:
    """Read what the driver wrote, write something, and see that Ray's own client finds the place too."""
    root = marker.rpartition("/")[0]
    try:
        if not storage.exists(marker):
            return f"the nodes do not share {root}; use a bucket, or a file system that all nodes mount"
        storage.require_writable(root)
        fs, path = pyarrow.fs.FileSystem.from_uri(storage.arrow_uri(marker))
        if fs.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
            return f"pyarrow does not find what fsspec wrote to {root}; give both the same endpoint and credentials"
    except (InputError, RunFailed, OSError) as error:
        return " ".join(str(error).split())
    return ""
