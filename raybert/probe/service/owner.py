"""RUN/probes/service.json: which probe service, of which cluster, serves a run, and when it last said so.

Two services on one run would measure everything twice. The one that was asked last owns the run; the other finds that
out before it writes anything and lets go. One that has not been heard of for `LEASE` seconds is gone with its cluster.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import ray

from raybert import storage
from raybert.ray_internals.names import HEAD_RESOURCE
from raybert.records import is_number, read_object

# Seconds. A service says every minute that it still serves a run with something in its queue.
LEASE = 180.0


@dataclass(frozen=True)
class Owner:
    """One service: its name (the version of the code) and the cluster that it lives in."""

    service: str
    cluster: str


def cluster_id() -> str:
    """Identity of the cluster that this process is connected to: its head's, with which it begins and ends."""
    return str(next(node["NodeID"] for node in ray.nodes() if HEAD_RESOURCE in node["Resources"]))


def claim(run_uri: str, owner: Owner) -> None:
    """Claim the run for this service, or renew the claim."""
    storage.write_json(_uri(run_uri), {**asdict(owner), "seen": time.time()})


def release(run_uri: str, owner: Owner) -> None:
    """Leave the run to whoever comes next, if it is this one's."""
    if owner_of(run_uri) == owner:
        storage.remove(_uri(run_uri))


def owner_of(run_uri: str) -> Owner | None:
    """Who serves the run, alive or not; a damaged note of it counts as none."""
    found = _read(run_uri)
    return Owner(str(found.get("service")), str(found.get("cluster"))) if found else None


def is_served(run_uri: str) -> bool:
    """Whether the run's service has renewed its claim recently."""
    return bool(time.time() - _read(run_uri).get("seen", 0.0) < LEASE)


def _uri(run_uri: str) -> str:
    return storage.join(run_uri, "probes", "service.json")


def _read(run_uri: str) -> dict[str, Any]:
    try:
        found = read_object(_uri(run_uri))
    except (FileNotFoundError, ValueError):
        return {}
    return found if is_number(found.get("seen")) else {}
