"""Ending a run early without losing work: the driver gets a signal, the workers write a checkpoint and return.

`ray job stop` sends the driver SIGTERM and, 3 seconds later (RAY_JOB_STOP_WAIT_TIME_S on the head), SIGKILL; Ctrl-C
sends SIGINT. The request travels through the key-value store of Ray's head, so that it needs no process of its own.
"""

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from raybert.ray_internals.core import has_flag, put_flag, remove_flag

T = TypeVar("T")
logger = logging.getLogger(__name__)

NAMESPACE = b"raybert"
POLL = 0.25  # seconds


def _key(run_uri: str) -> bytes:
    return f"stop {run_uri}".encode()


def request(uri: str) -> None:
    """Ask a run's workers to save and end; asked of a directory, it holds for all the runs in it."""
    put_flag(_key(uri), NAMESPACE)


def withdraw(uri: str) -> None:
    remove_flag(_key(uri), NAMESPACE)


def requested(run_uri: str) -> bool:
    directory = run_uri.rpartition("/")[0]
    return any(has_flag(_key(uri), NAMESPACE) for uri in (run_uri, directory))


def until_signal(run_uri: str, fit: Callable[[], T]) -> T:
    """Call `fit` and return its result. The first signal asks the run to end, a second one ends the process.

    `fit` runs in a thread, since Ray Train in the main thread takes SIGINT for itself and aborts without a checkpoint.
    In a thread already (a trial of a sweep) there are no signals to take.
    """
    withdraw(run_uri)
    if threading.current_thread() is not threading.main_thread():
        return fit()
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="fit", daemon=True)
    with on_signal(lambda: request(run_uri)):
        thread.start()
        while thread.is_alive():
            thread.join(POLL)  # not forever: a signal's handler runs between two waits
    if "error" in outcome:
        raise outcome["error"]
    result: T = outcome["result"]
    return result


@contextmanager
def on_signal(first: Callable[[], None]) -> Iterator[None]:
    """In the ``with``, SIGINT or SIGTERM calls `first`; the next one raises KeyboardInterrupt. Main thread only."""
    received = []

    def handle(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        print("stopping after a checkpoint; a second signal stops at once", file=sys.stderr, flush=True)
        first()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopVote:
    """The workers' agreement on the step after which they end, which must be the same one for all.

    Rank 0 watches for the request. Each step begins an exchange of two numbers and reads that of the step before, which
    is over by then, so no step waits for it. It goes over a group of its own, on CPUs, lest it come between the
    gradients' exchanges.
    """

    def __init__(self, run_uri: str, *, rank: int, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._asked = threading.Event()
        self._closed = threading.Event()
        self._work: Any = None
        self._votes = torch.zeros(2)
        if rank == 0:
            threading.Thread(target=self._watch, args=(run_uri,), name="stop-watch", daemon=True).start()

    def _watch(self, run_uri: str) -> None:
        while not self._closed.wait(POLL):
            try:
                asked = requested(run_uri)
            except Exception as error:  # the head is busy; the request is still there at the next look
                logger.warning("Cannot check whether %s should stop: %s", run_uri, error)
                continue
            if asked:
                self._asked.set()
                return

    def agreed(self, leaving: bool) -> tuple[bool, bool]:
        """Called by every rank once a step, with whether it was told that a node of the group goes.

        Returns:
            Whether all end after this step because the run was asked to, and whether they do because a node goes.
        """
        mine = torch.tensor([float(self._asked.is_set()), float(leaving)])
        if self._group is None:
            agreed = mine
        else:
            if self._work is not None:
                self._work.wait()
            agreed = self._votes
            self._votes = mine
            self._work = dist.all_reduce(self._votes, group=self._group, async_op=True)
        stop, leave = agreed.tolist()
        return stop > 0, leave > 0

    def close(self) -> None:
        self._closed.set()
