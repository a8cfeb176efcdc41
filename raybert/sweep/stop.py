"""Ending a sweep early without losing work: a signal asks the trials under way to save, and then ends Tune.

Ray Tune takes SIGINT for itself: it ends its trials at once, and returns as if all were done. SIGUSR1 is its other way
of ending: the state is written, and trials that were running are run again after `Tuner.restore`.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from raybert.train.recovery import stop

INTERRUPTED = "interrupted by a signal to the sweep"
# Seconds for the trials under way to save; one that has no workers yet has nothing to save and would never answer.
GRACE = 60.0


class _State:
    """Of this process. Tune keeps its callbacks pickled, and makes them anew for a resumed sweep: it is not theirs."""

    trials_uri = ""
    asked_at: float | None = None
    waiting: set[str] | None = None  # trials that are to save


def asked() -> bool:
    """A signal has come since the sweep began."""
    return _State.asked_at is not None


@contextmanager
def interruptible(trials_uri: str) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end the Tune run inside the ``with`` cleanly, and the second one at once.

    Args:
        trials_uri: the directory of the trials' run directories.
    """
    _State.trials_uri, _State.asked_at, _State.waiting = trials_uri, None, None
    stop.withdraw(trials_uri)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    try:
        with stop.on_signal(_ask):
            yield
    finally:
        stop.withdraw(trials_uri)


def _ask() -> None:
    _State.asked_at = time.monotonic()


class LetSave(tune.Callback):
    """Ends Tune when every trial that was under way at the signal has saved."""

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if _State.asked_at is None:
            return
        running = {trial.trial_id for trial in trials if trial.status == Trial.RUNNING}
        if _State.waiting is None:
            stop.request(_State.trials_uri)
            _State.waiting = running
        if not running & _State.waiting or time.monotonic() - _State.asked_at > GRACE:
            signal.raise_signal(signal.SIGUSR1)
