"""Programs that take turns on the same cores: while one steps, the process trees of all others are stopped.

A program is started once and runs for as long as it is measured, so Ray's own start is paid once and belongs to no
step, and a busy moment of the machine hits all sides within seconds. Stopped is everything that a program started:
Ray's servers, data tasks and workers as well as the driver.
"""

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

STUCK = 300.0  # seconds without a step
RATE = r"tokens_per_second\W+([0-9.]+)"


class Side:
    """A program that writes `tokens_per_second` and a number after each step.

    Args:
        arguments: of python.
        log: a file that takes what it prints.
        rates: the file in which the steps' rates are; the same one when None.
        settle: seconds of a turn that do not count.
    """

    def __init__(
        self, arguments: list[str], log: Path, rates: Path | None = None, *, settle: float, **environment: str
    ) -> None:
        self._log, self._rates, self._settle = log, rates or log, settle
        self._known: set[int] = set()  # every process of the tree that was ever signalled
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    def rates(self) -> list[float]:
        """Tokens per second of every step so far."""
        return [float(rate) for rate in re.findall(RATE, self._rates.read_text())] if self._rates.exists() else []

    def warm_up(self, steps: int) -> None:
        """Wait for its first steps, and stop."""
        self._wait(steps)
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> list[float]:
        """Go on, and stop again; the rates of the whole steps, at least one, in so many seconds after the first ones.

        What Ray's servers have to do when they wake up, late for all their timers, is no part of a step.
        """
        self._signal(signal.SIGCONT)
        time.sleep(self._settle)
        first = len(self.rates()) + 1  # the step that is under way began too early
        time.sleep(seconds)
        self._wait(first + 1)
        self._signal(signal.SIGSTOP)
        return self.rates()[first:]

    def _wait(self, count: int) -> None:
        known, since = -1, time.monotonic()
        while (found := len(self.rates())) < count:
            if found != known:
                known, since = found, time.monotonic()
            if self._process.poll() is not None or time.monotonic() - since > STUCK:
                raise RuntimeError(f"{self._process.args} stands still or ended:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.02)

    def _signal(self, number: signal.Signals) -> None:
        top = psutil.Process(self._process.pid)
        reached: set[int] = set()
        # Again, until no process is left that another one started meanwhile.
        while fresh := [process for process in (top, *top.children(recursive=True)) if process.pid not in reached]:
            for process in fresh:
                reached.add(process.pid)
                self._known.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._signal(signal.SIGSTOP)  # so that nothing new is started while they are killed
        for pid in self._known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def take_turns(sides: Sequence[Callable[[], Side]], *, rounds: int, seconds: float) -> list[float]:
    """Median tokens per second of each side.

    Args:
        sides: start each program; the next one is started when the one before is warm and stopped.
        rounds: turns of each side.
        seconds: of a turn that count, at least; it has one whole step, whatever that takes.
    """
    started: list[Side] = []
    found: list[list[float]] = [[] for _ in sides]
    try:
        for start in sides:
            started.append(start())
            started[-1].warm_up(2)
        for _ in range(rounds):
            for side, rates in zip(started, found, strict=True):
                rates.append(statistics.median(side.turn(seconds)))
    finally:
        for side in started:
            side.close()
    return [statistics.median(rates) for rates in found]
