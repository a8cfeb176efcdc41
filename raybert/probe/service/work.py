"""What the probe service has done in Ray tasks, and what their ends mean: a result, another attempt, or a failure."""

import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from raybert import storage
from raybert.encode.encoders import open_encoder, tokenize
from raybert.errors import last_line
from raybert.probe import kinds
from raybert.probe.baselines import Cache
from raybert.probe.evaluate import Material, Start, evaluate_all, prepare
from raybert.probe.kind import ProbeTask, TrainedKind
from raybert.probe.measure import train
from raybert.probe.service.queue import Entry, Record, read_record, record_uri
from raybert.storage.retry import FINAL
from raybert.tokenizer import files as tokenizers

# Attempts, with pauses of up to half a minute between them. A lost node is no fault of a probe: no limit for that.
MOST_MEMORY_KILLS = 4
MOST_CRASHES = 50  # half an hour of them: a process that crashes by itself must not hold its run's queue forever
LONGEST_PAUSE = 30.0
LOST_NODE = (NodeDiedError, ObjectLostError, LocalRayletDiedError)


def read_texts(task: ProbeTask, entry: Entry) -> ray.ObjectRef:
    """Start to read and tokenise a task's texts; the result is for all probes with the same `texts_key`."""
    return _prepare.options(**_options(entry)).remote(task, entry)


def texts_key(task: ProbeTask, entry: Entry) -> str:
    """Identity of the texts: the task, its files as they are now, the tokenizer, and the longest sequence."""
    try:
        stamps = task.stamps()
    except Exception as error:  # the attempt to read them will tell what is wrong
        stamps = [repr(error)]
    return f"{task.hash}:{min(task.max_tokens, entry.positions)}:{entry.tokenizer}:{stamps}"


def probe(
    entry: Entry, task: ProbeTask, texts: Sequence[ray.ObjectRef], cache: str, service: Any
) -> tuple[ray.ObjectRef, list[ray.ObjectRef]]:
    """Start a probe of the tasks with these texts, `task` the first. It tells `service.started` when it has got its
    CPUs.

    The trainings of a task that trains the encoder are Ray tasks of their own, at most `entry.workers` at a time. What
    each finds is kept beside the weights, so that a restarted probe reuses it.

    Returns:
        The probe, whose result is the first task's record, with `started`, and the others' records by name under
        `beside`; and the trainings that it waits for.
    """
    options, kind = _options(entry), kinds.of_task(task)
    trained: list[ray.ObjectRef] = []
    for number in range(kind.trainings if isinstance(kind, TrainedKind) else 0):
        # Ray starts it when the one that stands so many places before it has ended.
        before = [trained[number - entry.workers]] if number >= entry.workers else []
        trained.append(_train.options(**options).remote(entry, number, service, texts[0], *before))
    return _probe.options(**options).remote(entry, cache, service, len(texts), *texts, *trained), trained


def _options(entry: Entry) -> dict[str, Any]:
    """Processes of their own (the environment differs from other tasks'), with as many threads as CPUs."""
    threads = str(max(1, int(entry.cpus)))
    env = {"OMP_NUM_THREADS": threads, "RAYBERT_PROBE": threads}
    return {"num_cpus": entry.cpus, "num_gpus": entry.gpus, "runtime_env": {"env_vars": env}}


def _lower_priority() -> None:
    """Where processes share cores, training comes first; and no library may start a thread for every core."""
    if os.getpriority(os.PRIO_PROCESS, 0) < 10:
        os.setpriority(os.PRIO_PROCESS, 0, 10)
    torch.set_num_threads(int(os.environ["RAYBERT_PROBE"]))


# Ray would start a task again three times and then never: `try_again` decides.
@ray.remote(max_retries=0)
def _prepare(task: ProbeTask, entry: Entry) -> Material:
    _lower_priority()
    tokenizer = tokenizers.load(entry.weights) if entry.tokenizer else None
    return prepare(task, partial(tokenize, tokenizer=tokenizer), entry.positions)


@ray.remote(max_retries=0)
def _train(entry: Entry, number: int, service: Any, material: Material, *_before: Record) -> Record:
    started = _begin(entry, material, service)
    done = Cache(storage.join(entry.weights, "trained"))
    key = f"{material.data.hash}:{number}"
    found = done.get(key, lambda: train(open_encoder(entry.weights), material, number, _device()))
    return {**found, "started": started}


@ray.remote(max_retries=0)
def _probe(entry: Entry, cache: str, service: Any, tasks: int, *inputs: Any) -> Record:
    materials, trained = inputs[:tasks], inputs[tasks:]
    started = _begin(entry, materials[0], service)
    encoder, starts = open_encoder(entry.weights), [_start(entry, material.task.name) for material in materials]
    # With other resources a training that its budget cut short comes further.
    of_run = Cache(storage.join(entry.run_uri, "probes", "baselines", f"{entry.cpus:g}-cpus-{entry.gpus:g}-gpus"))
    options: dict[str, Any] = {"device": _device(), "trained": trained, "of_run": of_run}
    records = evaluate_all(encoder, materials, Cache(cache), starts=starts, **options)
    first, *others = records
    started = min([started, *(each["started"] for each in trained)])
    return {**first, "started": started, "beside": {record["task"]: record for record in others}}


def _begin(entry: Entry, material: Material, service: Any) -> float:
    """What comes first in the process of a probe; the time."""
    started = time.time()
    service.started.remote(entry.run_uri, entry.step, material.task.name, started)
    _lower_priority()
    return started


def _device() -> torch.device:
    return torch.device("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")


def _start(entry: Entry, task: str) -> Start | None:
    """What the run began with; None for the start's own probe, and where it was never queued."""
    if entry.begins_random:
        return "untrained"
    uri = record_uri(entry.run_uri, task, 0)
    if entry.step == 0 or not storage.exists(uri):
        return None
    return read_record(entry.run_uri, task, 0) or {"status": "failed", "reason": f"{uri} is damaged"}


def try_again(error: BaseException, failures: int) -> bool:
    """Whether a probe that has failed so often, this time included, may end otherwise the next time."""
    error = _unwrapped(error)
    if isinstance(error, LOST_NODE):
        return True
    if isinstance(error, OutOfMemoryError):
        return failures < MOST_MEMORY_KILLS
    if isinstance(error, OSError) and not isinstance(error, FINAL):
        return failures < MOST_CRASHES  # storage that is away
    # RayTaskError is what the task's own code raised; what that wraps is looked at above.
    return isinstance(error, RayError) and not isinstance(error, RayTaskError) and failures < MOST_CRASHES


def _unwrapped(error: BaseException) -> BaseException:
    """A task whose input was never made, since the process that made it ended, raises that end in a wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(error, RayTaskError) and isinstance(cause, RayError) else error


def pause_after(failures: int) -> float:
    """Seconds until the next attempt."""
    return min(LONGEST_PAUSE, 0.5 * 2.0 ** min(failures, 16))


def reason(error: BaseException, failures: int) -> str:
    """What went wrong in one line, without the remote stack."""
    error = _unwrapped(error)
    times = f" ({failures} times)" if failures > 1 else ""
    if isinstance(error, OutOfMemoryError):
        return (
            f"the probe's process was killed because its node ran out of memory{times}; give the nodes more memory, "
            "or lower the task's n_train and max_tokens"
        )
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return f"the probe's process was killed or crashed without a Python exception{times}"
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {last_line(cause, 'no message')}{times}"
