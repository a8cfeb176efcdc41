"""How many workers an elastic run has: what the nodes can hold, rounded down to a number that divides the global batch.

Ray Train's own policy takes every number in the range, restarts the workers the moment that nodes come, which throws
away the steps since the last checkpoint, and counts nodes that are gone for another while. This one adds workers to a
running group when a checkpoint has just been committed, and leaves a CPU share for the data tasks.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.train import ScalingConfig

from raybert.ray_internals.train import ResizingTrainer
from raybert.train.recovery import faults
from raybert.train.recovery.committed import last_step

logger = logging.getLogger(__name__)


def fitting_workers(
    nodes: Sequence[Mapping[str, float]],
    worker: Mapping[str, float],
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


class CheckpointedResizing:
    """The decisions of a run that changes its size at checkpoints; lives in Ray Train's controller."""

    def __init__(self, run_uri: str, allowed: Sequence[int], data_cpus: float, resize_seconds: float) -> None:
        self._run_uri, self._allowed, self._data_cpus = run_uri, allowed, data_cpus
        self._resize_seconds = resize_seconds
        self._pending: tuple[int, float] | None = None  # the newest checkpoint when a change was found due, and when

    def fitting(self, nodes: Mapping[str, Mapping[str, float]], worker: Mapping[str, float]) -> int:
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        return fitting_workers(
            [resources for node, resources in nodes.items() if node in alive],
            worker,
            allowed=self._allowed,
            data_cpus=self._data_cpus,
            total_cpus=sum(resources.get("CPU", 0.0) for resources in alive.values()),
        )

    def accepts(self, workers: int, wanted: int) -> bool:
        if wanted != workers:
            now = time.monotonic()
            if self._pending is None:
                self._pending = (self._newest(), now)
            newest, since = self._pending
            # Asked again at every poll until the next checkpoint is there. It may never come to a group that is too
            # large for what is left of the cluster, since its data tasks find no room.
            patient = wanted > workers or now - since < self._resize_seconds
            if patient and self._newest() == newest:
                return False
            text = f"the run continues with {wanted} workers instead of {workers}"
            faults.note(self._run_uri, "resize", text, workers=wanted)
        self._pending = None
        return True

    def _newest(self) -> int:
        try:
            return last_step(self._run_uri)
        except Exception as error:
            logger.warning("Cannot read %s; retrying: %s", self._run_uri, error)
            return self._pending[0] if self._pending else 0


class ElasticTrainer(ResizingTrainer):
    """TorchTrainer, with the decisions above where the number of workers is a range.

    Without Ray Train's own cleaner of placement groups, a process more in each run: `placement_groups.py`
    does it.
    """

    def __init__(
        self, run_uri: str, allowed: Sequence[int], data_cpus: float, *, scaling_config: ScalingConfig, **options: Any
    ) -> None:
        seconds = scaling_config.elastic_resize_monitor_interval_s
        resizing = CheckpointedResizing(run_uri, allowed, data_cpus, seconds)
        super().__init__(resizing, scaling_config=scaling_config, **options)
