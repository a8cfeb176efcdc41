"""What went wrong in a run, as sentences: printed while it goes on, and kept in RUN/faults/, a file each.

Each is ``{"time", "kind", "text"}`` and what else is known: rank, step, node, pid, stack. The run went on after each of
them, or said why it could not. A file each, since driver, controller and workers note them at the same time, and an
object store appends to nothing.
"""

import errno
import json
import logging
import posixpath
import time
import uuid
from typing import Any

from raybert import storage
from raybert.errors import InputError, last_line
from raybert.ray_internals import names
from raybert.records import read_object

logger = logging.getLogger(__name__)

FAULTS = "faults"
OUT_OF_MEMORY = (
    names.OUT_OF_MEMORY,
    "can't allocate memory",
    "out of memory",
    "cannot allocate memory",
    "_status_alloc_failed",
)
PEER_LOST = ("Connection reset by peer", "Connection closed by peer", "NCCL communicator was aborted")


def note(run_uri: str, kind: str, text: str, **details: Any) -> None:
    """Add a fault to the run's list. A failure to write it is only logged."""
    logger.info("%s: %s", run_uri, text)
    now = time.time_ns()
    content = json.dumps({"time": now / 1e9, "kind": kind, "text": text, **details}, default=str)
    uri = storage.join(run_uri, FAULTS, f"{now:020d}-{uuid.uuid4().hex[:8]}.json")
    try:
        storage.write_bytes(uri, content.encode() + b"\n")
    except Exception as error:
        logger.warning("Cannot record the fault in %s: %s", uri, error)


def read_faults(run_uri: str, seen: set[str] | None = None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The faults in the order of time, and what is wrong with each file that cannot be read, by the file's name.

    Those named in `seen`, which grows by the others, are left out.
    """
    seen = set() if seen is None else seen
    uris = [uri for uri in storage.list_dir(storage.join(run_uri, FAULTS)) if uri.endswith(".json") and uri not in seen]
    seen.update(uris)
    found, damaged = [], {}
    for uri in uris:
        try:
            fault = read_object(uri)
            if not isinstance(fault.get("text"), str) or not isinstance(fault.get("kind"), str):
                raise ValueError("it lacks its kind or its text")
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged[posixpath.basename(uri)] = str(error)
        else:
            found.append(fault)
    return found, damaged


def describe(error: BaseException) -> tuple[str, str]:
    """(kind, what happened) for an error that ended a worker."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines()]
    last = last_line(error)
    cause = getattr(error, "cause", None) or error
    if type(cause).__name__ == "Preempted":
        return "preempted", f"stopped: {last}"
    if isinstance(cause, MemoryError) or any(mark in text.lower() for mark in OUT_OF_MEMORY):
        return "out_of_memory", (
            "ran out of memory; lower train.micro_batch, or give each worker more memory (fewer workers on a node). "
            f"({_first(lines, OUT_OF_MEMORY) or last})"
        )
    if (isinstance(cause, OSError) and cause.errno == errno.ENOSPC) or "No space left on device" in text:
        return "disk_full", f"ran out of disk space; free some on its node. ({last})"
    if getattr(error, "preempted", False):
        return "preempted", "was lost with its node, which was preempted"
    if _is_actor_loss(error):
        if names.NODE_LOST in text:  # what Ray says of a process that died alone speaks of nodes as well
            return "node_lost", f"was lost with its node. ({_first(lines, (names.NODE_LOST,))})"
        return "process_died", (
            "was killed (by the kernel when memory runs out, or by a user) or crashed without a Python exception"
        )
    if names.WORKER_SILENT in f"{type(error).__name__} {type(cause).__name__}":
        return "hang", "stopped responding to Ray Train"
    if sentence := input_fault(error):
        return "bad_input", f"got invalid input: {sentence}"
    if names.DATA_STALLED in f"{type(error).__name__} {type(cause).__name__} {text}":
        return "data_stalled", "got no data: no data task made progress, perhaps because no CPU was free for one"
    if any(mark in text for mark in PEER_LOST):
        return "peer_lost", "lost its connection to another worker"
    return "error", last


def input_fault(error: BaseException | None) -> str:
    """The sentence of the InputError that an error comes from, through Ray's wrappers; empty if there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError):
            return _first_line(cause)
        if isinstance(error, InputError):
            return last_line(error).rpartition("InputError: ")[2]
        error = cause if isinstance(cause, BaseException) else error.__cause__
    return ""


def _first_line(error: InputError) -> str:
    """The sentence alone: Ray Data adds lines on its settings for another attempt."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _is_actor_loss(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError) or type(error).__name__ == names.WORKER_LOST


def _first(lines: list[str], marks: tuple[str, ...]) -> str:
    return next((line for line in lines if any(mark in line.lower() for mark in marks)), "")
