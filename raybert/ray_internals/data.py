"""What Ray Data lacks: shares of a CPU for every operator, and a say in when its tasks begin."""

from collections.abc import Callable
from dataclasses import dataclass

import ray.data
from ray.data._internal.datasource.range_datasource import RangeDatasource
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.map_operator import MapOperator

_MAY_START = "raybert.may_start"  # in the dataset's context


def range_of(count: int, *, cpus: float, blocks: int) -> ray.data.Dataset:
    """Rows ``{"id": i}`` for i < `count`, made by tasks that take this share of a CPU.

    Missing: `ray.data.range` has no argument for it. Operators that ask for the same are fused into one, and a whole
    CPU, the default, is never free on a machine whose workers hold nearly all. Run with Ray 2.60.
    """
    source = RangeDatasource(count, column_name="id")
    return ray.data.read_datasource(source, num_cpus=cpus, override_num_blocks=blocks)


def repartitioned(dataset: ray.data.Dataset, *, rows: int, cpus: float) -> ray.data.Dataset:
    """The dataset in blocks of so many rows, cut by tasks that take this share of a CPU.

    Missing: `Dataset.repartition` has no argument for it. Run with Ray 2.60.
    """
    blocks = dataset.repartition(target_num_rows_per_block=rows)
    blocks._logical_plan.dag.ray_remote_args["num_cpus"] = cpus
    return blocks


@dataclass(frozen=True)
class Progress:
    """How far a map operator of a dataset is.

    Missing: as for `StartPolicy`. Run with Ray 2.60.
    """

    running: int  # tasks under way
    finished: int
    unread: float  # of what finished tasks put out, what nobody took yet, in tasks
    waiting: bool  # whether the next operator has something that it has not begun


class StartPolicy(BackpressurePolicy):
    """Lets a map operator begin a task when the function of `limit_starts` says so.

    Missing: a public way to hold tasks back. ``ExecutionOptions.resource_limits`` bounds bytes, and the executor takes
    a whole core for as long as the bound is reached. Run with Ray 2.60.
    """

    def can_add_input(self, op: PhysicalOperator) -> bool:
        if not isinstance(op, MapOperator):
            return True
        unread = 0.0
        if size := op.metrics.average_bytes_outputs_per_task:
            unread = self._resource_manager.get_mem_op_outputs(op, include_ineligible_downstream=True) / size
        progress = Progress(
            running=op.num_active_tasks(),
            finished=op.metrics.num_tasks_finished,
            unread=unread,
            waiting=any(self._topology[to].has_pending_bundles() for to in op.output_dependencies),
        )
        may_start: Callable[[Progress], bool] = self._data_context.get_config(_MAY_START)
        return may_start(progress)


def limit_starts(dataset: ray.data.Dataset, may_start: Callable[[Progress], bool]) -> None:
    """Ask `may_start`, which is pickled, before a map operator of the dataset begins a task.

    It is asked before Ray Data's own policies: the executor stops at the first one that says no.

    Missing: as for `StartPolicy`. Run with Ray 2.60.
    """
    policies = [StartPolicy, *ENABLED_BACKPRESSURE_POLICIES]
    dataset.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    dataset.context.set_config(_MAY_START, may_start)
