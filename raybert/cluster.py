"""Reaching a Ray cluster, and sharing its CPUs between training workers, data tasks and probes."""

import json
import logging
import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import yaml

from raybert import storage
from raybert.errors import InputError

# Placement of what must outlive a preemption: any node but those that carry the label. Drivers of jobs run on the head,
# and Ray Train puts a run's controller beside its driver.
MARKET_TYPE = "ray.io/market-type"
OFF_SPOT = {MARKET_TYPE: "!spot"}
# What the autoscaler may grow the cluster to, as JSON: {"CPU": 96, "GPU": 8}. For where it cannot be read (Kubernetes).
LIMITS = "RAYBERT_MAX_RESOURCES"

# How Ray Train shall behave in a Ray that `start` starts. The dashboard's list of training runs costs an actor that
# imports torch, at the moment when the workers start: on two cores seconds until the first step. Such a Ray is looked
# at through `raybert watch`. And nobody preempts its one node.
LOCAL = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
_set_here: list[str] = []

# On a machine with fewer cores than processes, data tasks and probes each take this share of a CPU, or a little less
# where one core has to hold a worker, two data tasks, a probe and the driver of a sweep's trial.
SMALL_SHARE = 0.25
SMALLEST_SHARE = 0.2
# A worker on less than this would only slow the others down.
SMALLEST_WORKER = 0.25


def connect(*, quiet: bool = True) -> bool:
    """Connect to the cluster that RAY_ADDRESS names (in a submitted job, its own), or start Ray on this machine.

    Returns:
        True when a local Ray was started, which ends with this process.

    Raises:
        InputError: RAY_ADDRESS is set and no cluster answers there, or this process is on a spot node of it.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    if address:
        while _set_here:  # for a Ray of this process, which has ended
            os.environ.pop(_set_here.pop(), None)
        try:
            _knock(address)
            ray.init(address=address, **_logging(quiet))
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"No Ray cluster answers at RAY_ADDRESS={address}; start it, or unset RAY_ADDRESS to use this machine."
            ) from error
        _refuse_spot_node()
        return False
    start(quiet=quiet)
    return True


def _logging(quiet: bool) -> dict[str, Any]:
    return {"log_to_driver": not quiet, "logging_level": logging.ERROR if quiet else logging.INFO}


def start(*, quiet: bool = True) -> None:
    """Start Ray on this machine, whatever RAY_ADDRESS says, unless one is there; it ends with this process."""
    if ray.is_initialized():
        return
    # A worker, its data tasks and a probe need two CPUs to be placed, which a machine of one core has to share.
    cpus = max(2, os.cpu_count() or 1)
    # Workers, data tasks, the controller and probes are more processes than a small machine has CPUs, each with a
    # fraction of one: no reason for Ray to warn, in the middle of a progress bar, that there are many.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(4, cpus)))
    # Ray ends idle processes beyond its CPUs within a second. Data tasks with a share of a CPU each are more than that,
    # and every chapter would be built by a process that starts for it.
    os.environ.setdefault("RAY_num_workers_soft_limit", str(cpus + 6))
    for name in LOCAL.keys() - os.environ.keys():
        os.environ[name] = LOCAL[name]
        _set_here.append(name)
    # "local": without an address Ray would join a cluster that `ray start` left running on this machine.
    ray.init(address="local", num_cpus=cpus, include_dashboard=True, dashboard_host="127.0.0.1", **_logging(quiet))


def find() -> None:
    """Connect to the cluster that RAY_ADDRESS names, or to the Ray that runs on this machine. None is started.

    Raises:
        InputError: there is none, or more than one on this machine, or as `connect`.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        connect()
        return
    # By its processes: ray.init(address="auto") believes a file that outlives the cluster that it names, and then tries
    # for two minutes to reach it.
    from ray._private.services import find_gcs_addresses

    addresses = sorted(find_gcs_addresses())
    if len(addresses) != 1:
        found = f"More than one Ray runs on this machine ({', '.join(addresses)})" if addresses else "No Ray runs here"
        raise InputError(f"{found}: set RAY_ADDRESS to the cluster that is meant, as host:port.")
    ray.init(address=addresses[0], log_to_driver=False, logging_level=logging.ERROR)


def _knock(address: str) -> None:
    """Ray itself would try for a minute to reach a port where nobody listens.

    Raises:
        OSError: nobody listens at ``host:port``; other kinds of addresses are not tried.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@dataclass(frozen=True)
class Shares:
    """CPUs for one training worker, one data task and one probe, and whether each worker takes a GPU."""

    worker: float
    data_task: float
    probe: float
    use_gpu: bool


def plan_shares(
    cpus: float,
    gpus: float,
    *,
    workers: int,
    worker_cpus: float | Literal["auto"] = "auto",
    task_cpus: float | Literal["auto"] = "auto",
    probe_cpus: float | Literal["auto"] = "auto",
    use_gpu: bool | Literal["auto"] = "auto",
    reserved: float = 0.0,
) -> Shares:
    """Divide what the cluster can ever have: each worker, and beside them at least one data task.

    A worker that waits for data holds its CPU, so a data task that finds none free would wait for ever: the sum is
    checked here, before anything starts. On a small machine the automatic shares become fractions of a CPU, with room
    for two data tasks and a probe beside the workers. A probe whose share was given may have to wait for the end of
    training instead.

    Args:
        cpus, gpus: the most that the cluster can have, an autoscaler's upper limits included.
        reserved: CPUs that others hold (Tune's drivers).

    Raises:
        InputError: the workers and one data task can never be placed together, or a probe can never be placed at all.
    """
    gpu = gpus >= workers if use_gpu == "auto" else use_gpu
    if gpu and gpus < workers:
        raise InputError(
            f"train.workers={workers} needs {workers} GPUs and the cluster can have at most {gpus:g}; "
            "lower train.workers or set train.use_gpu=false."
        )
    free = cpus - reserved
    roomy = free >= workers + 2
    small = min(SMALL_SHARE, max(SMALLEST_SHARE, _floor((free - workers * SMALLEST_WORKER) / 3)))
    data = task_cpus if task_cpus != "auto" else (1.0 if roomy else small)
    probe = probe_cpus if probe_cpus != "auto" else (1.0 if roomy else small)
    for key, share in (("probe.cpus", probe_cpus), ("data.task_cpus", task_cpus), ("train.worker_cpus", worker_cpus)):
        if share != "auto" and share > free:
            raise InputError(
                f"{key}={share:g} is more than this cluster can ever give: it can have at most {free:g} CPUs; "
                f"lower {key} or use a larger cluster."
            )
    given = task_cpus != "auto" or probe_cpus != "auto"
    worker = worker_cpus if worker_cpus != "auto" else _worker_share(free, workers, data, probe, given)
    if worker_cpus == "auto" and worker < SMALLEST_WORKER:
        raise InputError(_too_many(cpus, free, workers, data, task_cpus != "auto"))
    if workers * worker + data > free + 1e-6:
        lower = ["train.workers"] * (workers > 1) + ["train.worker_cpus"] + ["data.task_cpus"] * (task_cpus != "auto")
        raise InputError(
            f"{workers} workers of {worker:g} CPUs and a data task of {data:g} need "
            f"{workers * worker + data:g} CPUs, and the cluster can have at most {free:g}; "
            f"lower {' or '.join(lower)}."
        )
    return Shares(worker, data, probe, gpu)


def _worker_share(free: float, workers: int, data: float, probe: float, given: bool) -> float:
    """CPUs of one worker: a whole one, or what two data tasks and a probe leave.

    Where one of these shares was given, and is large, there may be one data task at a time, and no room for a probe.
    """
    if free >= workers + 2 and workers + data <= free:
        return 1.0
    beside = 2 * data + probe
    # A whole CPU beside the workers if it can be: Ray Data 2.60 rounds what is left for it down, and its scheduler
    # spins, at 0.7 of a core, when that gives 0.
    choices = [max(1.0, beside), beside, *([data + probe, data] if given else [])]
    shares = [min(1.0, _floor((free - held) / workers)) for held in choices]
    return next((share for share in shares if share >= SMALLEST_WORKER), shares[1])


def _floor(cpus: float) -> float:
    """Rounded down to hundredths."""
    return math.floor(100 * cpus + 1e-6) / 100


def _too_many(cpus: float, free: float, workers: int, data: float, data_given: bool) -> str:
    if data_given and free - 3 * SMALLEST_SHARE >= workers * SMALLEST_WORKER:
        return (
            f"data.task_cpus={data:g} leaves too little for train.workers={workers}: this cluster can have at most "
            f"{cpus:g} CPUs; lower data.task_cpus or use a larger cluster."
        )
    most = max(0, int((free - 3 * SMALLEST_SHARE) / SMALLEST_WORKER + 1e-6))
    if not most:
        return f"This cluster can have at most {cpus:g} CPUs, too few for one worker; use a larger one."
    return (
        f"train.workers={workers} is more than this cluster can ever run: it has at most {cpus:g} CPUs, enough "
        f"for {most} workers; lower train.workers or use a larger cluster."
    )


def _refuse_spot_node() -> None:
    if ray.get_runtime_context().get_node_labels().get(MARKET_TYPE) == "spot":
        raise InputError(
            "This driver is on a spot node, and all its work would be lost with the node; submit it as a job "
            "(`raybert submit`), whose driver runs on the head."
        )


def largest_resources() -> tuple[float, float]:
    """(CPUs, GPUs) that the cluster can ever have: what it has now, or the autoscaler's limit where that is more.

    Raises:
        InputError: RAYBERT_MAX_RESOURCES is set and is no JSON object of numbers.
    """
    now, stated = ray.cluster_resources(), stated_limits()
    limit = _monitored_limits() if stated is None else stated
    return max(now.get("CPU", 0.0), limit.get("CPU", 0.0)), max(now.get("GPU", 0.0), limit.get("GPU", 0.0))


def stated_limits() -> dict[str, float] | None:
    """What the environment states as the autoscaler's limits, if it does.

    Raises:
        InputError: it is no JSON object of numbers.
    """
    stated = os.environ.get(LIMITS)
    if not stated:
        return None
    try:
        return {name: float(value) for name, value in json.loads(stated).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f'{LIMITS}={stated} is no JSON object like {{"CPU": 96, "GPU": 8}}.') from error


def _monitored_limits() -> dict[str, float]:
    """The limits in the file that this cluster's autoscaler was started with; empty where there is none.

    Ray 2.60 publishes them nowhere. Its monitor runs on the head, as job drivers do; its command line names the file.
    """
    gcs = ray.get_runtime_context().gcs_address
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        flags = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
        config = flags.get("--autoscaling-config")
        if config and flags.get("--gcs-address") == gcs and storage.exists(config):
            return limits_of(yaml.safe_load(storage.read_bytes(config)))
    return {}


def limits_of(autoscaling: dict[str, Any]) -> dict[str, float]:
    """CPUs and GPUs of the head and of as many workers as a cluster file allows."""
    total = {"CPU": 0.0, "GPU": 0.0}
    for name, node_type in autoscaling["available_node_types"].items():
        most = int(node_type.get("max_workers", autoscaling.get("max_workers", 0)))
        count = most + 1 if name == autoscaling["head_node_type"] else most
        for resource in total:
            total[resource] += count * float(node_type.get("resources", {}).get(resource, 0))
    return total
