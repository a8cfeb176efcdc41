"""How a cluster's CPUs are shared between training workers, data tasks and probes."""

import math
from dataclasses import dataclass
from typing import Literal

from raybert.errors import InputError

# On a machine with fewer cores than processes, data tasks and probes each take this share of a CPU, or a little less
# where one core has to hold a worker, two data tasks, a probe and the driver of a sweep's trial.
SMALL_SHARE = 0.25
SMALLEST_SHARE = 0.2
# A worker on less than this would only slow the others down.
SMALLEST_WORKER = 0.25


@dataclass(frozen=True)
class Shares:
    """CPUs for one training worker, one data task and one probe, and whether each worker takes a GPU."""

    worker: float
    data_task: float
    probe: float
    use_gpu: bool


def plan_shares(
    cpus: float,
    gpus: float,
    *,
    workers: int,
    worker_cpus: float | Literal["auto"] = "auto",
    task_cpus: float | Literal["auto"] = "auto",
    probe_cpus: float | Literal["auto"] = "auto",
    probes: int = 1,
    use_gpu: bool | Literal["auto"] = "auto",
    reserved: float = 0.0,
) -> Shares:
    """Divide what the cluster can ever have: each worker, and beside them at least one data task.

    A worker that waits for data holds its CPU, so a data task that finds none free would wait forever: the sum is
    checked here, before anything starts. On a small machine the automatic shares become fractions of a CPU, with room
    for two data tasks and the probes beside the workers. A probe whose share was given may have to wait for the end of
    training instead.

    Args:
        cpus, gpus: the most that the cluster can have, an autoscaler's upper limits included.
        probes: processes of the run's probes at a time.
        reserved: CPUs that others hold (Tune's drivers).

    Raises:
        InputError: the workers and one data task can never be placed together, or a probe can never be placed at all.
    """
    gpu = gpus >= workers if use_gpu == "auto" else use_gpu
    if gpu and gpus < workers:
        raise InputError(
            f"train.workers={workers} needs {workers} GPUs, but the cluster can have at most {gpus:g}; lower "
            "train.workers or set train.use_gpu=false."
        )
    free = cpus - reserved
    roomy = free >= workers + 1 + probes
    small = min(SMALL_SHARE, max(SMALLEST_SHARE, _floor((free - workers * SMALLEST_WORKER) / (2 + probes))))
    data = task_cpus if task_cpus != "auto" else (1.0 if roomy else small)
    probe = probe_cpus if probe_cpus != "auto" else (1.0 if roomy else small)
    for key, share in (("probe.cpus", probe_cpus), ("data.task_cpus", task_cpus), ("train.worker_cpus", worker_cpus)):
        if share != "auto" and share > free:
            raise InputError(
                f"{key}={share:g} needs more CPUs than this cluster can have ({free:g} at most); lower {key} or "
                "use a larger cluster."
            )
    given = task_cpus != "auto" or probe_cpus != "auto"
    worker = worker_cpus if worker_cpus != "auto" else _worker_share(free, workers, data, probes * probe, roomy, given)
    if worker_cpus == "auto" and worker < SMALLEST_WORKER:
        raise InputError(_too_many(cpus, free, workers, data, task_cpus != "auto", probes))
    if workers * worker + data > free + 1e-6:
        lower = ["train.workers"] * (workers > 1) + ["train.worker_cpus"] + ["data.task_cpus"] * (task_cpus != "auto")
        raise InputError(
            f"{workers} workers of {worker:g} CPUs and a data task of {data:g} need {workers * worker + data:g} "
            f"CPUs, but the cluster can have at most {free:g}; lower {' or '.join(lower)}."
        )
    return Shares(worker, data, probe, gpu)


def _worker_share(free: float, workers: int, data: float, probe: float, roomy: bool, given: bool) -> float:
    """CPUs of one worker: a whole one, or what two data tasks and the probes leave.

    Where one of these shares was given, and is large, there may be one data task at a time, and no room for a probe.
    """
    if roomy and workers + data <= free:
        return 1.0
    beside = 2 * data + probe
    # A whole CPU beside the workers if it can be: Ray Data 2.60 rounds what is left for it down, and its scheduler
    # spins, at 0.7 of a core, when that gives 0.
    choices = [max(1.0, beside), beside, *([data + probe, data] if given else [])]
    shares = [min(1.0, _floor((free - held) / workers)) for held in choices]
    return next((share for share in shares if share >= SMALLEST_WORKER), shares[1])


def _floor(cpus: float) -> float:
    """Rounded down to hundredths."""
    return math.floor(100 * cpus + 1e-6) / 100


def _too_many(cpus: float, free: float, workers: int, data: float, data_given: bool, probes: int) -> str:
    others = 2 + probes
    if probes > 1 and free - 3 * SMALLEST_SHARE >= workers * SMALLEST_WORKER > free - others * SMALLEST_SHARE:
        return (
            f"probe.workers={probes} leaves too few CPUs for train.workers={workers}: this cluster can have at "
            f"most {cpus:g} CPUs; lower probe.workers or use a larger cluster."
        )
    if data_given and free - others * SMALLEST_SHARE >= workers * SMALLEST_WORKER:
        return (
            f"data.task_cpus={data:g} leaves too few CPUs for train.workers={workers}: this cluster can have at "
            f"most {cpus:g} CPUs; lower data.task_cpus or use a larger cluster."
        )
    most = max(0, int((free - others * SMALLEST_SHARE) / SMALLEST_WORKER + 1e-6))
    if not most:
        return f"This cluster can have at most {cpus:g} CPUs, too few for one worker; use a larger cluster."
    return (
        f"train.workers={workers} does not fit this cluster: it can have at most {cpus:g} CPUs, enough for {most} "
        "workers; lower train.workers or use a larger cluster."
    )
