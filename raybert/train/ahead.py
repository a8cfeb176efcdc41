"""Processes and imports of a run, made while its driver waits for something else.

Ray makes a process when a task or an actor asks for one, a second of starting Python. A run on one machine asks for
some ten, one after the other: controller, the actors beside it, workers, the stream's coordinator, data tasks.
"""

import importlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray._private.utils import get_runtime_env_info
from ray.core.generated.common_pb2 import Language
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.runtime_env import RuntimeEnv

logger = logging.getLogger(__name__)

# What Ray Train gives to its controller, and that to its workers. A controller takes a report at each of its polls. At
# the default of 2 seconds a job that is stopped, and killed 3 seconds later, would not get its last checkpoint
# committed.
DEFAULTS = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
# Two processes of the controller's environment are asked for before the workers do: the two actors beside it. Behind
# them come the data set's actor, the stream's coordinator, Ray Data's statistics and a data task.
BEFORE, BEHIND = 2, 4
PAUSE = 1.0  # seconds between two, as long as one takes: what is needed now shall have the cores first
MOST_WORKERS = 3  # by then the run asks for the others itself
KEPT = 120  # seconds for which Ray keeps a process that nobody asks for


@contextmanager
def imported(*modules: str) -> Iterator[None]:
    """Inside the ``with`` a thread imports what is needed next."""

    def work() -> None:
        with suppress(Exception):  # who needs it imports it again, and says so
            for module in modules:
                importlib.import_module(module)

    thread = threading.Thread(target=work, name="imports", daemon=True)
    thread.start()
    yield
    thread.join()


def set_defaults() -> None:
    """How Ray Train shall behave, in this process's environment, but for what is set otherwise."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def make_processes(workers: int, environment: Mapping[str, str]) -> None:
    """Begin to make those that a run will ask for; returns at once. For a Ray of this machine alone.

    Args:
        environment: the workers' own variables.
    """
    set_defaults()
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    # A process is used by what asks for the very same environment, spaces of its JSON included: that is how a driver
    # asks for a controller, and a controller for workers.
    around = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"} | get_env_vars_to_propagate()
    beside = _request(json.dumps({"env_vars": around}, sort_keys=True))
    worker = _request(json.dumps({"env_vars": {**around, **environment}}, sort_keys=True, separators=(",", ":")))
    node = next(node for node in ray.nodes() if node["Alive"])
    raylet = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    # The last one is the hang watch, which rank 0 starts.
    requests = [*[beside] * BEFORE, *[worker] * min(workers, MOST_WORKERS), *[beside] * BEHIND, worker]

    def make() -> None:  # and ask nothing of `ray`, which would start anew where it has been shut down
        try:
            with init_grpc_channel(raylet, options=GLOBAL_GRPC_OPTIONS) as channel:
                for request in requests:
                    time.sleep(PAUSE)
                    NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10.0)
        except Exception as error:  # then Ray makes them when they are asked for
            logger.info("No process was made ahead: %s", error)

    threading.Thread(target=make, name="processes", daemon=True).start()


def _request(runtime_env: str) -> PrestartWorkersRequest:
    """What asks a raylet for one process of this job."""
    info = get_runtime_env_info(RuntimeEnv())
    info.serialized_runtime_env = runtime_env
    return PrestartWorkersRequest(
        language=Language.PYTHON,
        job_id=ray.get_runtime_context().job_id.binary(),
        runtime_env_info=info,
        keep_alive_duration_secs=KEPT,
        num_workers=1,
    )
