"""Finding the rank that hangs: every rank tells a watch how far it is, and the watch names and ends the one that stops.

A rank that stands still stops all others in their next exchange, so the silence of a run says nothing about who is to
blame. Each rank has a thread that tells the watch its step, what it is at and, once it stands still, where in the code.
The watch is an actor in a process of its own, so a rank that is stopped altogether is missed by it.
"""

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybert.ray_internals.names import PROCESS
from raybert.train.recovery import faults

BEAT = 1.0  # seconds between two messages of a rank
NOTING = 30.0  # seconds that a hang's note may take
FIRST_STEP = 900.0  # seconds that the first step may take: compilation, first reads
# A rank whose innermost frames are in one of these waits for the others.
EXCHANGES = ("all_reduce", "in agreed", "backward", "broadcast", "barrier", "in report", "_engine_run_backward")
WAITS_FOR_STORAGE = ("data", "checkpoint", "report")


@dataclass
class Rank:
    """What the watch knows of one rank."""

    node: str
    pid: int
    step: int = 0
    progress: int = -1
    phase: str = ""
    stack: str = ""
    moved: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)


def stalled_ranks(ranks: dict[int, Rank], *, now: float, limit: float, silence: float, patience: float) -> list[int]:
    """The ranks that hang, if none makes progress: the silent ones, else those not waiting in an exchange, else all.

    Args:
        limit: seconds without progress.
        silence: seconds without a word; also a rank that only waits has its pulse.
        patience: so many more while a rank waits for storage.
    """
    if not ranks:  # none has told of itself yet
        return []
    silent = [rank for rank, known in ranks.items() if now - known.heard > silence]
    if silent:
        return silent
    allowed = {r: limit + (patience if k.phase in WAITS_FOR_STORAGE else 0.0) for r, k in ranks.items()}
    if any(now - known.moved <= allowed[rank] for rank, known in ranks.items()):
        return []
    working = [r for r, k in ranks.items() if not any(mark in k.stack for mark in EXCHANGES)]
    behind = min(known.step for known in ranks.values())
    return working or [rank for rank, known in ranks.items() if known.step == behind]


class HangWatch:
    """The actor. It notes a hang in the run's faults and ends the process, and Ray Train restarts the group."""

    def __init__(self, run_uri: str, factor: float, least: float, patience: float) -> None:
        self._run_uri, self._factor, self._least, self._patience = run_uri, factor, least, patience
        self._ranks: dict[int, Rank] = {}
        self._seconds: deque[float] = deque(maxlen=50)  # of a step, lately
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, rank: int, node: str, pid: int, step: int, progress: int, phase: str, stack: str) -> None:
        now = time.monotonic()
        with self._lock:
            known = self._ranks.setdefault(rank, Rank(node, pid, step))
            if (step, progress) != (known.step, known.progress):
                if step > known.step and known.phase != "start":  # from which it jumps to the restored step
                    self._seconds.append((now - known.moved) / (step - known.step))
                known.moved = now
            known.step, known.progress, known.phase, known.stack, known.heard = step, progress, phase, stack, now

    def leave(self, rank: int) -> None:
        """The rank has ended, with or without success, and will be silent from now on."""
        with self._lock:
            self._ranks.pop(rank, None)

    @property
    def limit(self) -> float:
        if not self._seconds:
            return max(FIRST_STEP, self._least)
        return max(self._least, self._factor * statistics.median(self._seconds))

    def _watch(self) -> None:
        while True:
            time.sleep(BEAT)
            with self._lock:
                now, limit = time.monotonic(), self.limit
                silence = limit if self._seconds else self._least
                blamed = stalled_ranks(self._ranks, now=now, limit=limit, silence=silence, patience=self._patience)
                found = [(rank, self._ranks.pop(rank)) for rank in blamed]
                if found:
                    self._ranks.clear()  # the others end with them
            self._end(found, now)

    def _end(self, blamed: list[tuple[int, Rank]], now: float) -> None:
        """Note the hang of each, and then end them: when rank 0 dies, or the group with it, this actor is gone too."""
        stacks = [known.stack or _stack(known) for _, known in blamed]
        with self._lock:
            found = [(*one, stack) for one, stack in zip(blamed, stacks, strict=True) if not self._has_moved(*one)]
        notes = [threading.Thread(target=self._note, args=(*one, now), daemon=True) for one in found]
        for note in notes:
            note.start()
        end = time.monotonic() + NOTING  # a storage that is away as well must not keep the processes
        for note in notes:
            note.join(max(0.0, end - time.monotonic()))
        for rank, known, _ in found:
            try:
                on_its_node(known, end_process)
            except Exception as error:
                text = f"rank {rank} (process {known.pid}) could not be killed ({type(error).__name__}: {error})"
                faults.note(self._run_uri, "hang", text, rank=rank, node=known.node, pid=known.pid)

    def _has_moved(self, rank: int, blamed: Rank) -> bool:
        """Whether it got ahead since it was taken off the list."""
        again = self._ranks.get(rank)
        return again is not None and (again.step, again.progress) != (blamed.step, blamed.progress)

    def _note(self, rank: int, known: Rank, stack: str, now: float) -> None:
        faults.note(
            self._run_uri,
            "hang",
            f"rank {rank} (process {known.pid} on node {known.node[:12]}) made no progress for "
            f"{now - known.moved:.0f} s, at step {known.step + 1} in {known.phase or 'start'}; it is killed, and "
            f"the group restarts from the newest checkpoint. It hung at: {last_frame(stack)}",
            rank=rank,
            node=known.node,
            pid=known.pid,
            step=known.step + 1,
            phase=known.phase,
            stack=stack,
        )


def _stack(rank: Rank) -> str:
    try:
        return on_its_node(rank, stack_of)
    except Exception as error:
        return f"(none: {type(error).__name__})"


def on_its_node(rank: Rank, function: Callable[[int], str]) -> str:
    """Call a function with the rank's process id on the rank's node; what it returns, within a minute."""
    where = NodeAffinitySchedulingStrategy(rank.node, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=where)
    found: str = ray.get(task.remote(rank.pid), timeout=60)
    return found


def last_frame(stack: str) -> str:
    lines = [line.strip() for line in stack.splitlines() if line.strip()]
    return " ".join(lines[-2:])[:300]


def stack_of(pid: int) -> str:
    """Runs on the node of the process: its stack, as far as it can be had, and its state."""
    _require_worker(pid)
    py_spy = Path(sys.executable).with_name("py-spy")
    stack = ""
    if py_spy.exists():
        command = [str(py_spy), "dump", "--nonblocking", "--pid", str(pid)]
        with suppress(OSError, subprocess.SubprocessError):  # the stack is welcome, the end is needed
            stack = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    state = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State")]
    return f"{stack}\n{state[0] if state else ''}".strip()


def end_process(pid: int) -> str:
    """Runs on the node of the process; returns the title that it had."""
    title = _require_worker(pid)
    os.kill(pid, signal.SIGKILL)
    return title


def _require_worker(pid: int) -> str:
    title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    if not title.startswith(PROCESS):
        raise RuntimeError(f"process {pid} is no longer a Ray worker")
    return title
