"""Placement groups that nobody can use any more, and that Ray keeps: they hold CPUs and GPUs for as long as it lives.

Ray removes the placement group of a dead actor only when the actor's job has ended too. Ray Train sends an actor of its
own after the groups of a controller that died, which learns of a group once all its workers have started, and of the
death through the dashboard: too late for a controller that is killed before, and never while the dashboard is away.
"""

import logging

import ray
from ray._private.state import state
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

logger = logging.getLogger(__name__)


def remove_orphans() -> int:
    """Remove the groups whose makers are dead and belonged to this job or to one that has ended. Returns how many."""
    gone = {job["JobID"] for job in state.job_table() if job["IsDead"]}
    mine = ray.get_runtime_context().get_job_id()
    removed = 0
    for content in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(content)
        if group.is_detached or group.state == PlacementGroupTableData.REMOVED:
            continue
        job, actor = group.creator_job_id.hex(), ActorID(group.creator_actor_id)
        # A detached actor outlives its job, and its groups do with it.
        dead = job in gone if actor.is_nil() else job in gone | {mine} and _is_dead(actor)
        if dead:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            logger.warning("Removed the placement group %s of a process that is gone", group.placement_group_id.hex())
            removed += 1
    return removed


def _is_dead(actor: ActorID) -> bool:
    return state.actor_table(actor.hex()).get("State", "DEAD") == "DEAD"
