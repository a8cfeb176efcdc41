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

from raybert.ray_internals.core import actor_record, ended_jobs, placement_groups
from raybert.ray_internals.names import TRAIN_CONTROLLER
from raybert.repeat import repeated

logger = logging.getLogger(__name__)

INTERVAL = 20.0  # seconds


def removed_meanwhile() -> AbstractContextManager[None]:
    """Inside the ``with``, remove again and again what `remove_orphans` finds: a controller may die at any time."""
    # The end does not wait for a Ray that has gone.
    return repeated(remove_orphans, seconds=INTERVAL, name="orphans", join=1.0)


def remove_orphans() -> int:
    """Remove the groups of dead controllers of this job and of jobs that have ended. Returns how many.

    Best effort: a failure is only logged.
    """
    try:
        return _remove_orphans()
    except Exception as error:
        logger.warning("Cannot look for unused placement groups: %s", error)
        return 0


def _remove_orphans() -> int:
    jobs = ended_jobs() | {ray.get_runtime_context().get_job_id()}
    removed = 0
    for group in placement_groups():
        if not (group.detached or group.removed) and group.job in jobs and _is_dead_controller(group.actor):
            group.remove()
            logger.warning("Removed the placement group %s of a controller that died", group.id)
            removed += 1
    return removed


def _is_dead_controller(actor: str) -> bool:
    """Others may have given their group's handle away before they died, so it is for the controllers alone."""
    return bool(actor) and actor_record(actor) == ("DEAD", TRAIN_CONTROLLER)
