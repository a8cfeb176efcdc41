"""How many workers an elastic run has: what the nodes can hold, rounded down to a number that divides the global batch.

Ray Train's own policy takes every number in the range, restarts the workers the moment that nodes come, which throws
away the steps since the last checkpoint, and counts nodes that are gone for another while. This one adds workers to a
running group when a checkpoint has just been committed, and leaves a CPU share for the data tasks.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from raybert.train.recovery import faults
from raybert.train.recovery.committed import last_step

logger = logging.getLogger(__name__)


def fitting_workers(
    nodes: Sequence[dict[str, float]],
    worker: dict[str, float],
    *,
    allowed: Sequence[int],
    data_cpus: float,
    total_cpus: float,
) -> int:
    """The largest allowed number of workers that fits; 0 when none does.

    Args:
        nodes: resources of each node that workers may have.
        worker: what one worker takes, each value above 0.
        allowed: numbers of workers that the run may have.
        data_cpus: CPUs that must be left for data tasks, of `total_cpus` in the cluster.
    """
    # Shares of a CPU are sums of floats: 3 x 0.1 is a little more than 0.3.
    fits = sum(int(min(node.get(name, 0.0) / amount + 1e-6 for name, amount in worker.items())) for node in nodes)
    while fits and fits * worker.get("CPU", 0.0) + data_cpus > total_cpus + 1e-6:
        fits -= 1
    return max((count for count in allowed if count <= fits), default=0)


class CheckpointedElasticPolicy(ElasticScalingPolicy):
    """Lives in Ray Train's controller."""

    def __init__(self, scaling: ScalingConfig, run_uri: str, allowed: Sequence[int], data_cpus: float) -> None:
        super().__init__(scaling)
        self._run_uri, self._allowed, self._data_cpus = run_uri, allowed, data_cpus
        self._pending: tuple[int, float] | None = None  # the newest checkpoint when a change was found due, and when

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        return fitting_workers(
            [resources for node, resources in reserved_resources.items() if node in alive],
            {name: amount for name, amount in self.scaling_config._resources_per_worker_not_none.items() if amount},
            allowed=self._allowed,
            data_cpus=self._data_cpus,
            total_cpus=sum(resources.get("CPU", 0.0) for resources in alive.values()),
        )

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, NoopDecision):
            now = time.monotonic()
            if self._pending is None:
                self._pending = (self._newest(), now)
            newest, since = self._pending
            # Asked again at every poll until the next checkpoint is there. It may never come to a group that is too
            # large for what is left of the cluster, since its data tasks find no room.
            self._latest_monitor_time = float("-inf")
            shrinks = decision.num_workers < worker_group_state.num_workers
            patient = not shrinks or now - since < self.scaling_config.elastic_resize_monitor_interval_s
            if patient and self._newest() == newest:
                return NoopDecision()
            text = f"the run goes on with {decision.num_workers} workers instead of {worker_group_state.num_workers}"
            faults.note(self._run_uri, "resize", text, workers=decision.num_workers)
        self._pending = None
        return decision

    def _newest(self) -> int:
        try:
            return last_step(self._run_uri)
        except Exception as error:
            logger.warning("Cannot look into %s for now: %s", self._run_uri, error)
            return self._pending[0] if self._pending else 0


class ElasticTrainer(TorchTrainer):
    """TorchTrainer, with the policy above where the number of workers is a range.

    Without Ray Train's own cleaner of placement groups, a process more in each run: `placement_groups.py`
    does it.
    """

    def __init__(self, run_uri: str, allowed: Sequence[int], data_cpus: float, **options: Any) -> None:
        super().__init__(**options)
        self._policy = (run_uri, allowed, data_cpus)

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            controller["scaling_policy"] = CheckpointedElasticPolicy(self.scaling_config, *self._policy)
        return super()._initialize_and_run_controller(**controller)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
