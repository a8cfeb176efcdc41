"""Ray's own records of a cluster, which its public API has not, or only where a dashboard runs."""

import logging
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private.node import Node
from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray._private.runtime_env.packaging import _dir_travel
from ray._private.state import state
from ray._raylet import ActorID, GcsClient, PlacementGroupID  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_exists, _internal_kv_put
from ray.util.placement_group import PlacementGroup, remove_placement_group


def local_addresses() -> list[str]:
    """``host:port`` of each Ray that runs on this machine, by its processes.

    Missing: ``ray.init(address="auto")`` believes a file that outlives the cluster that it names, and then tries to
    reach it for two minutes. Run with Ray 2.60.
    """
    return sorted(services.find_gcs_addresses())


def end_unstarted(error: BaseException) -> Path | None:
    """End the processes of a node of this machine that `ray.init` has given up, and return the directory of its logs.

    Missing: a way to reach the node. `ray.init` raises and leaves the processes running that were up, and only the
    traceback refers to them. Run with Ray 2.60.

    Args:
        error: what `ray.init` raised. None is returned where that was before it had a node with such a directory.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is Node.__init__.__code__:
            node = frame.f_locals["self"]
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
            try:
                return Path(node.get_logs_dir_path())
            except AttributeError:  # it had none yet
                return None
    return None


def dashboard_address() -> str:
    """``host:port`` or URL of the dashboard of the cluster that this process is connected to; empty if it has none.

    Missing: the address is in what `ray.init` returned and nowhere else. To call it again with ``ignore_reinit_error``
    would set Ray's handler of SIGTERM anew. Run with Ray 2.60.
    """
    return ray._private.worker._global_node.webui_url or ""


def packed_files(directory: Path) -> list[Path]:
    """The files that Ray packs of a job's working directory.

    Missing: a list of them. Ray's own walk is the only one that reads .gitignore and .rayignore as it does. Run with
    Ray 2.60.

    Raises:
        OSError: a part of it cannot be read.
    """
    found: list[Path] = []
    quiet = logging.getLogger(f"{__name__}.packaging")
    quiet.disabled = True  # the error that it would log is raised as well
    ignoring = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(directory, [], found.append, include_gitignore=ignoring, logger=quiet)
    return [path for path in found if path.is_file()]


# -- the key-value store of the head -----------------------------------------------------------------------------------


def put_flag(key: bytes, namespace: bytes) -> None:
    """Set a flag in the head's key-value store.

    Missing: a store without a process of its own; a named actor is one. Run with Ray 2.60.
    """
    _internal_kv_put(key, b"1", namespace=namespace)


def remove_flag(key: bytes, namespace: bytes) -> None:
    """Take back a flag that was set with `put_flag`, if it was.

    Missing: as for `put_flag`. Run with Ray 2.60.
    """
    _internal_kv_del(key, namespace=namespace)


def has_flag(key: bytes, namespace: bytes) -> bool:
    """Whether a flag was set with `put_flag`.

    Missing: as for `put_flag`. Run with Ray 2.60.
    """
    return bool(_internal_kv_exists(key, namespace=namespace))


# -- placement groups, and whose they are --


@dataclass(frozen=True)
class GroupRecord:
    """A placement group and who created it; IDs in hexadecimal.

    Missing: `ray.util.placement_group_table` does not say who created a group, and `ray.util.state` asks the dashboard.
    Run with Ray 2.60.
    """

    id: str
    job: str
    actor: str  # empty where a driver or a task created it
    detached: bool
    removed: bool

    def remove(self) -> None:
        """Free what it holds."""
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(self.id)))


def placement_groups() -> list[GroupRecord]:
    """All that the cluster knows of, removed ones included.

    Missing: as for `GroupRecord`. Run with Ray 2.60.
    """
    found = []
    for content in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(content)
        actor = ActorID(group.creator_actor_id)
        found.append(
            GroupRecord(
                id=group.placement_group_id.hex(),
                job=group.creator_job_id.hex(),
                actor="" if actor.is_nil() else actor.hex(),
                detached=group.is_detached,
                removed=group.state == PlacementGroupTableData.REMOVED,
            )
        )
    return found


def ended_jobs() -> set[str]:
    """IDs of the jobs whose drivers have ended, in hexadecimal.

    Missing: `ray.util.state.list_jobs` asks the dashboard. Run with Ray 2.60.
    """
    return {job["JobID"] for job in state.job_table() if job["IsDead"]}


def actor_record(actor: str) -> tuple[str, str]:
    """(state, class name) of an actor by its ID in hexadecimal; empty strings where the cluster does not know it.

    Missing: `ray.util.state.get_actor` asks the dashboard. Run with Ray 2.60.
    """
    known = state.actor_table(actor)
    return known.get("State", ""), known.get("ActorClassName", "")


# -- nodes --


def drain_node(address: str, label: tuple[str, str], *, seconds: float, why: str) -> None:
    """Tell the cluster at ``host:port`` that the node with this label, (name, value), is about to be taken away.

    Missing: `ray drain-node` takes a node's ID, and a process that has not joined the cluster has no API that finds a
    node by its label. Run with Ray 2.60.

    Args:
        seconds: until the node is gone.

    Raises:
        RuntimeError: the cluster does not know the node, or refuses.
    """
    client, (name, value) = GcsClient(address=address), label
    node = _node_with(client, name, value)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, refusal = client.drain_node(node.hex(), reason, why, int((time.time() + seconds) * 1000))
    if not accepted:
        raise RuntimeError(refusal)


def _node_with(client: Any, name: str, value: str) -> Any:
    for node, info in client.get_all_node_info().items():
        if info.labels.get(name) == value:
            return node
    raise RuntimeError("the cluster does not know this node")
