"""The probe service as runs and people reach it: by name, in the cluster that this process is connected to."""

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util import list_named_actors

from raybert.cluster import OFF_SPOT, connect
from raybert.errors import RunFailed
from raybert.probe.service import owner, queue
from raybert.probe.service.queue import Record

log = logging.getLogger(__name__)
NAMESPACE = "raybert"
PREFIX = "probe-service-"


@functools.cache
def service_name() -> str:
    """The name of the service that runs this version of the code.

    A detached actor keeps the code that it was started with for as long as it lives. Another version must not be given
    its place, or be served by it: hence the digest of the package's sources in the name.
    """
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return PREFIX + digest.hexdigest()[:12]


def ensure_service(root: str) -> Any:
    """The handle of this version's service, which is started if there is none.

    Args:
        root: any URI that all nodes can write; a service that is started keeps its list of runs and its baselines
            there. One that runs already keeps its own.
    """
    from raybert.probe.service.actor import ProbeService

    name = service_name()
    actor = ray.remote(ProbeService).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        label_selector=OFF_SPOT,
        scheduling_strategy="DEFAULT",  # not within a sweep's trial, whose end would take the service along
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=8,
    )
    return actor.remote(name, root)


def serve(run_uri: str, root: str) -> None:
    """Have a service serve the run's queue, starting one if there is none; returns when the service knows the run."""
    ray.get(ensure_service(root).submit.remote(run_uri))


def announce(run_uri: str, root: str) -> None:
    """Tell the service that something is new in the run's queue. If it does not respond, it finds the entries later."""
    ensure_service(root).submit.remote(run_uri)


def wait(
    run_uri: str,
    root: str,
    *,
    timeout: float | None = None,
    progress: Callable[[int], None] | None = None,
    take_over: bool = True,
) -> None:
    """Return when nothing of the run is queued any more.

    Args:
        take_over: have the run served by this cluster. Without it the queue is only looked at while some service, of
            whatever cluster, gives signs of life there; Ray is connected to (or started) when none does.
        timeout: seconds; None waits forever.
        progress: called with the number of checkpoints left.

    Raises:
        RunFailed: the timeout has passed.
    """
    end = None if timeout is None else time.monotonic() + timeout
    announced = 0.0
    while waiting := queue.waiting_steps(run_uri):
        if time.monotonic() - announced > 30:
            announced = time.monotonic()
            if take_over or not owner.is_served(run_uri):
                connect()
                serve(run_uri, root)
        if progress is not None:
            progress(len(waiting))
        if end is not None and time.monotonic() > end:
            raise RunFailed(f"{len(waiting)} checkpoints of {run_uri} are still waiting for a probe.")
        time.sleep(1.0)


def services() -> list[str]:
    """Names of all probe services of the cluster; more than one when several versions are in use."""
    actors = list_named_actors(all_namespaces=True)
    return sorted(a["name"] for a in actors if a["namespace"] == NAMESPACE and a["name"].startswith(PREFIX))


def statuses(timeout: float = 10.0) -> list[Record]:
    """`ProbeService.status` of each service of the cluster; one that does not answer in time has a "reason" instead."""
    found: list[Record] = []
    for name in services():
        try:
            service: Any = ray.get_actor(name, namespace=NAMESPACE)
            found.append(ray.get(service.status.remote(), timeout=timeout))
        except (ray.exceptions.RayError, ValueError) as error:
            found.append({"name": name, "runs": [], "reason": f"does not respond ({type(error).__name__})"})
    return found


def stop() -> list[str]:
    """Stop all probe services of the cluster and return their names. Queued probes wait for the next service."""
    names = services()
    for name in names:
        service: Any = ray.get_actor(name, namespace=NAMESPACE)
        try:
            ray.get(service.release.remote(), timeout=10)
        except ray.exceptions.RayError as error:  # its runs are free when its last sign of life is old
            log.warning("%s does not respond (%s); stopping it anyway", name, type(error).__name__)
        ray.kill(service, no_restart=True)
    return names
