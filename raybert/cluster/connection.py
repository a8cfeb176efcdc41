"""Reaching a Ray cluster: the one that RAY_ADDRESS names, or one on this machine; and what it can grow to."""

import json
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import yaml

from raybert import storage
from raybert.errors import InputError, RunFailed, last_line
from raybert.ray_internals import names
from raybert.ray_internals.core import end_unstarted, local_addresses

logger = logging.getLogger(__name__)

# Placement of what must outlive a preemption: any node but those that carry the label. Drivers of jobs run on the head,
# and Ray Train puts a run's controller beside its driver.
MARKET_TYPE = "ray.io/market-type"
OFF_SPOT = {MARKET_TYPE: "!spot"}
# What the autoscaler may grow the cluster to, as JSON: {"CPU": 96, "GPU": 8}. For where it cannot be read (Kubernetes).
LIMITS = "RAYBERT_MAX_RESOURCES"

# How Ray Train shall behave in a Ray that `start` starts. The dashboard's list of training runs costs an actor that
# imports torch, at the moment when the workers start: on two cores seconds until the first step. Such a Ray is looked
# at through `raybert watch`. And nobody preempts its one node.
LOCAL = {names.STATE_TRACKING: "0", names.PREEMPTION_WATCHER: "0"}
_set_here: list[str] = []
# Attempts to start Ray. Its raylet waits 15 seconds, fixed in its code, for each of its agents, and then ends.
STARTS = 3
# What Ray and its processes log stays in their own files.
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}

# The kernel's limit of a socket's path in bytes, and the longest of those of Ray 2.60, below its temporary directory.
LONGEST_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
SOCKET = "session_0000-00-00_00-00-00_000000_{pid}/sockets/dash_MetricsHead"
SHORT_TEMPORARY = "/tmp"


def connect() -> bool:
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
            _require_listener(address)
            ray.init(address=address, **QUIET)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"No Ray cluster answers at RAY_ADDRESS={address}; start it, or unset RAY_ADDRESS to use this machine."
            ) from error
        _refuse_spot_node()
        return False
    start()
    return True


def start() -> None:
    """Start Ray on this machine, whatever RAY_ADDRESS says, unless one is there; it ends with this process.

    Raises:
        InputError: Ray cannot keep its files in the temporary directory.
        RunFailed: as `launch`.
    """
    if ray.is_initialized():
        return
    _choose_temporary_directory()
    # A worker, its data tasks and a probe need two CPUs to be placed, which a machine of one core has to share.
    cpus = max(2, os.cpu_count() or 1)
    # Workers, data tasks, the controller and probes are more processes than a small machine has CPUs, each with a
    # fraction of one: no reason for Ray to warn, in the middle of a progress bar, that there are many.
    os.environ.setdefault(names.STARTUP_CONCURRENCY, str(max(4, cpus)))
    # Ray ends idle processes beyond its CPUs within a second. Data tasks with a share of a CPU each are more than that,
    # and every chapter would be built by a process that starts for it.
    os.environ.setdefault(names.IDLE_PROCESSES, str(cpus + 6))
    for name in LOCAL.keys() - os.environ.keys():
        os.environ[name] = LOCAL[name]
        _set_here.append(name)
    launch(cpus)


def launch(cpus: int) -> Any:
    """Start Ray on this machine with this many CPUs, again if it is not up in time, and return `ray.init`'s context.

    Raises:
        RunFailed: it does not start. The processes that were up have been ended.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            # "local": without an address Ray would join a cluster that `ray start` left running on this machine.
            return ray.init(address="local", num_cpus=cpus, include_dashboard=True, dashboard_host="127.0.0.1", **QUIET)
        except Exception as error:  # Ray has no type of its own for this
            logs = end_unstarted(error)
            ray.shutdown()  # where it failed later, Ray itself has the node
            if names.START_TIMED_OUT not in str(error):
                raise RunFailed(f"Ray failed to start on this machine: {last_line(error)}") from error
            if attempt == STARTS:
                raise RunFailed(
                    f"Ray did not start on this machine in {STARTS} attempts: the machine is too busy, or a process of "
                    f"Ray failed. Stop other programs and try again; raylet.out in {logs} has the cause."
                ) from error
            logger.warning("Ray did not start in time, usually because the machine is busy; starting it again.")


def _choose_temporary_directory() -> None:
    """Let Ray keep its files in /tmp where the path of TMPDIR is too long for its sockets.

    Raises:
        InputError: RAY_TMPDIR is too long, or the directory cannot be written.
    """
    # Ray 2.60 chooses it like this and has no public name for it; on a Mac it does not look at TMPDIR.
    variables = ("RAY_TMPDIR",) if sys.platform == "darwin" else ("RAY_TMPDIR", "TMPDIR")
    name = next((variable for variable in variables if variable in os.environ), "")
    folder = os.environ.get(name, SHORT_TEMPORARY)
    said = f"{name}={folder}" if name else folder
    remedy = f"set RAY_TMPDIR to another directory, such as RAY_TMPDIR={SHORT_TEMPORARY}."
    place, fault = os.path.join(folder, "ray"), ""
    spare = LONGEST_SOCKET_PATH - len(os.fsencode(os.path.join(place, SOCKET.format(pid=os.getpid()))))
    if spare < 0 and name == "RAY_TMPDIR":
        raise InputError(f"The path {said} is {-spare} bytes too long for the sockets that Ray creates in it; {remedy}")
    if spare < 0:
        logger.warning(
            "The path %s is too long for Ray's sockets; Ray and its processes use %s instead.",
            *(said, SHORT_TEMPORARY),
        )
        tempfile.gettempdir()  # this process keeps its own
        # TMPDIR too: Ray's dashboard and its workers put sockets of multiprocessing there.
        os.environ["RAY_TMPDIR"] = os.environ["TMPDIR"] = SHORT_TEMPORARY
        return
    try:
        os.makedirs(place, exist_ok=True)
        fault = "" if os.access(place, os.W_OK | os.X_OK) else f"{place} belongs to another user"
    except OSError as error:
        fault = str(error.strerror)
    if fault:
        raise InputError(f"Ray cannot keep its files in {said} ({fault}); {remedy}")


def find() -> None:
    """Connect to the cluster that RAY_ADDRESS names, or to the Ray that runs on this machine. None is started.

    Raises:
        InputError: there is none, or more than one on this machine, or as `connect`.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        connect()
        return
    addresses = local_addresses()
    if len(addresses) != 1:
        found = (
            f"More than one Ray is running on this machine ({', '.join(addresses)})"
            if addresses
            else "No Ray is running on this machine"
        )
        raise InputError(f"{found}: set RAY_ADDRESS to the cluster to use, as host:port.")
    ray.init(address=addresses[0], **QUIET)


def _require_listener(address: str) -> None:
    """Ray itself would try for a minute to reach a port where nobody listens.

    Raises:
        OSError: nobody listens at ``host:port``; other kinds of addresses are not tried.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _refuse_spot_node() -> None:
    if ray.get_runtime_context().get_node_labels().get(MARKET_TYPE) == "spot":
        raise InputError(
            "This driver runs on a spot node and would be lost with it; submit the command as a job (`raybert "
            "submit`), whose driver runs on the head node."
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
        raise InputError(f'{LIMITS}={stated} is not a JSON object such as {{"CPU": 96, "GPU": 8}}.') from error


def _monitored_limits() -> dict[str, float]:
    """The limits in the file that this cluster's autoscaler was started with; empty where there is none.

    Ray publishes them nowhere. Its monitor runs on the head, as job drivers do; its command line names the file.
    """
    gcs = ray.get_runtime_context().gcs_address
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        flags = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
        config = flags.get(names.MONITOR_CONFIG)
        if config and flags.get(names.MONITOR_CLUSTER) == gcs and storage.exists(config):
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
