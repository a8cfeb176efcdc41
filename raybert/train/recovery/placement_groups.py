"""The placement groups of Ray Train's controllers that died: Ray keeps them, and the CPUs and GPUs in them.

Ray removes the placement group of a dead actor only when the actor's job has ended too. Ray Train would send an actor
of its own after the groups of a controller that died, which learns of a group once all its workers have started, and of
the death through the dashboard: too late for a controller that is killed before, and never while the dashboard is away.
So our runs have none (`elastic.py`), and this module does it: for a controller that is killed, and for that of a trial
which is pruned.
"""

import logging
from contextlib import AbstractContextManager

import ray
from ray._private.state import state
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raybert.repeat import repeated

logger = logging.getLogger(__name__)

CONTROLLER = "TrainController"
INTERVAL = 20.0  # seconds


def removed_meanwhile() -> AbstractContextManager[None]:
    """Inside the ``with``, remove again and again what `remove_orphans` finds: a controller may die at any time."""
    # The end does not wait for a Ray that has gone.
    return repeated(remove_orphans, seconds=INTERVAL, name="orphans", join=1.0)


def remove_orphans() -> int:
    """Remove the groups of dead controllers of this job and of jobs that have ended. Returns how many.

    It is a courtesy: where it cannot be done, that is logged and no more.
    """
    try:
        return _remove_orphans()
    except Exception as error:
        logger.warning("Placement groups that nobody uses could not be looked for: %s", error)
        return 0


def _remove_orphans() -> int:
    jobs = {job["JobID"] for job in state.job_table() if job["IsDead"]} | {ray.get_runtime_context().get_job_id()}
    removed = 0
    for content in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(content)
        if group.is_detached or group.state == PlacementGroupTableData.REMOVED:
            continue
        if group.creator_job_id.hex() in jobs and _is_dead_controller(ActorID(group.creator_actor_id)):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            logger.warning("Removed the placement group %s of a controller that died", group.placement_group_id.hex())
            removed += 1
    return removed


def _is_dead_controller(actor: ActorID) -> bool:
    """Others may have given their group's handle away before they died, so it is for the controllers alone."""
    known = {} if actor.is_nil() else state.actor_table(actor.hex())
    return (known.get("State"), known.get("ActorClassName")) == ("DEAD", CONTROLLER)
