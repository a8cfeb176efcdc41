"""What Ray Train and Ray Tune lack: the size of an elastic run left to us, and a rank that knows that its node goes."""

from collections.abc import Mapping
from typing import Any, Protocol

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy


def preemption_noticed() -> bool:
    """Whether this worker was told that a node of its group is about to go. A look at a variable.

    Missing: `ray.train.get_context` says nothing of it; a `UserCallback` in the controller cannot reach a rank. Run
    with Ray 2.60.
    """
    return get_train_context().preemption_context.preemption_info is not None


class Resizing(Protocol):
    """Decides how many workers an elastic run has; lives in Ray Train's controller.

    Missing: as for `ResizingTrainer`. Run with Ray 2.60.
    """

    def fitting(self, nodes: Mapping[str, Mapping[str, float]], worker: Mapping[str, float]) -> int:
        """How many workers there may be, 0 if none.

        Args:
            nodes: node ID -> what Ray Train reserved there. Nodes that are gone are among them for a while.
            worker: what a worker takes, each value above 0.
        """

    def accepts(self, workers: int, wanted: int) -> bool:
        """Whether the run goes on with `wanted` workers now, instead of `workers`.

        Asked at each poll of the controller. Equal numbers mean that no change is due, or that it is too early to look.
        """


class ResizingPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy, with both decisions left to `Resizing`.

    Missing: as for `ResizingTrainer`. Run with Ray 2.60.
    """

    def __init__(self, scaling: ScalingConfig, resizing: Resizing) -> None:
        super().__init__(scaling)
        self._resizing = resizing

    def _count_possible_workers(self, reserved_resources: Mapping[str, Mapping[str, float]]) -> int:
        worker = self.scaling_config._resources_per_worker_not_none
        return self._resizing.fitting(reserved_resources, {name: amount for name, amount in worker.items() if amount})

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        workers = worker_group_state.num_workers
        wanted = decision.num_workers if isinstance(decision, ResizeDecision) else workers
        if self._resizing.accepts(workers, wanted):
            return decision
        self._latest_monitor_time = float("-inf")  # so that it looks again at the next poll
        return NoopDecision()


class ResizingTrainer(TorchTrainer):
    """`TorchTrainer` that leaves the number of workers to `Resizing`, where it is a range, and removes no group.

    Missing: ``ScalingConfig`` takes a range and no policy, and the trainer starts a cleaner of placement groups that
    cannot be turned off: a process more in each run, which hears of a controller's death too late. Run with Ray 2.60.
    """

    def __init__(self, resizing: Resizing, **options: Any) -> None:
        super().__init__(**options)
        self._resizing = resizing

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            controller["scaling_policy"] = ResizingPolicy(self.scaling_config, self._resizing)
        return super()._initialize_and_run_controller(**controller)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def withhold_from_trials(prefix: str) -> None:
    """Keep environment variables whose names begin so out of what Ray Tune hands to its trials, and writes into logs.

    Missing: a setting for what is handed on. Run with Ray 2.60.
    """
    from ray.tune.execution import class_cache  # not at the top: a worker of a run needs no Tune

    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith(prefix)}
