"""Placement groups of processes that are gone are removed, and nobody else's."""

import subprocess
import sys
import time

import pytest
import ray
from ray._private.state import state
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from raybert.train.recovery.placement_groups import remove_orphans

pytestmark = pytest.mark.usefixtures("ray_cluster")
# A driver that leaves a detached actor with a placement group, and ends.
ANOTHER_JOB = """
import sys, ray
from tests.integration.test_orphans import TrainController
ray.init(address=sys.argv[1], log_to_driver=False)
maker = ray.remote(num_cpus=0)(TrainController).options(name="maker", namespace="orphans", lifetime="detached").remote()
ray.get(maker.make.remote())
"""


class Maker:
    def make(self) -> str:
        self.group = placement_group([{"CPU": 0.1}])
        ray.get(self.group.ready())
        return self.group.id.hex()


class TrainController(Maker):
    """Named as Ray Train's own."""


def end(actor: ray.actor.ActorHandle) -> None:
    """Kill it, and wait until Ray knows."""
    ray.kill(actor)
    while state.actor_table(actor._actor_id.hex())["State"] != "DEAD":
        time.sleep(0.05)


def states() -> dict[str, str]:
    return {name: group["state"] for name, group in placement_group_table().items()}


def test_the_groups_of_dead_controllers_are_removed_and_no_others():
    mine = placement_group([{"CPU": 0.1}])
    makers = [ray.remote(num_cpus=0)(kind).remote() for kind in (TrainController, TrainController, Maker)]
    dead, alive, another = ray.get([maker.make.remote() for maker in makers])
    end(makers[0])
    end(makers[2])
    ray.get(mine.ready())
    assert states()[dead] == "CREATED", "Ray removes it by itself now, and raybert need not"
    assert remove_orphans() == 1
    found = states()
    assert found[dead] == "REMOVED"
    assert {found[alive], found[another], found[mine.id.hex()]} == {"CREATED"}
    assert remove_orphans() == 0
    end(makers[1])
    for group in (mine, PlacementGroup(PlacementGroupID.from_hex(another))):
        remove_placement_group(group)
    assert remove_orphans() == 1


def test_the_group_of_a_detached_actor_outlives_its_job():
    address = ray.get_runtime_context().gcs_address
    subprocess.run([sys.executable, "-c", ANOTHER_JOB, address], check=True)
    maker = ray.get_actor("maker", namespace="orphans")
    name = ray.get(maker.make.remote())
    assert remove_orphans() == 0
    assert states()[name] == "CREATED"
    end(maker)
    remove_orphans()
    assert states()[name] == "REMOVED"
