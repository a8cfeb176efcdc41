"""Keeping a run going where Ray Train gives up: a lost controller, a damaged checkpoint, too many lost nodes."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ray.exceptions import RayActorError
from ray.train import ControllerError, TrainingFailedError, UserCallback

from raybert import storage
from raybert.errors import DamagedCheckpoint, InputError, RunFailed
from raybert.storage.retry import retry
from raybert.train.recovery import faults
from raybert.train.recovery.committed import last_step
from raybert.train.recovery.placement_groups import remove_orphans
from raybert.train.recovery.repair import repair

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0
RESTART_PAUSE = 2.0  # seconds between a failure of workers and what is done about it


def fit_with_restarts(fit: Callable[[], Any], run_uri: str, *, max_failures: int, patience: float) -> Any:
    """Call `fit()`, and again from the newest complete checkpoint after a failure, as long as it makes progress.

    Ray Train restarts its workers by itself. It does not survive the loss of its controller, an error in it (storage
    that is down when it notes a checkpoint), or more worker failures in the whole life of a run than a fixed number.
    Here only failures without a new checkpoint between them are counted.

    Args:
        fit: builds a trainer and runs it.
        max_failures: of these; Ray Train has its own count of the same size for each `fit`.
        patience: seconds to keep retrying storage.

    Raises:
        RunFailed: there were more failures in a row, or one that a retry would not change.
        KeyboardInterrupt: the driver was interrupted, which Ray Train turns into an exit with code 0.
    """
    failures, reached = 0, _last_step(run_uri, patience)
    while True:
        remove_orphans()
        try:
            return fit()
        except SystemExit as error:
            raise KeyboardInterrupt from error
        except (TrainingFailedError, RayActorError) as error:
            now = _last_step(run_uri, patience)
            had = max(reached, now)
            failures = 1 if now > reached else failures + 1
            progress, reached = now > reached, now
            text, final = _classify(error, progress)
            if final or failures > max_failures:
                remove_orphans()
                raise RunFailed(
                    f"Training of {run_uri} stopped: {text}. The full traceback is in Ray's logs of this session; "
                    "rerun the same command to resume from the newest checkpoint."
                ) from error
            retry(partial(_repair_or_fail, run_uri, had), f"reading {run_uri}", seconds=patience)
            faults.note(
                run_uri, "restart", f"{text}; resuming from step {_last_step(run_uri, patience)}", failures=failures
            )
            time.sleep(min(2.0**failures, LONGEST_PAUSE))
            # Ray Train writes there when it starts, and fails where it cannot.
            retry(lambda: _require_writable(run_uri), f"writing to {run_uri}", seconds=patience)


def _repair_or_fail(run_uri: str, had: int) -> None:
    """
    Raises:
        RunFailed: the run had a checkpoint of the step `had`, and now nothing tells of any.
    """
    if not repair(run_uri) and had and not last_step(run_uri):
        raise RunFailed(f"The checkpoint of step {had} of {run_uri} is gone; restore it.")


def _require_writable(run_uri: str) -> None:
    place = storage.join(run_uri, ".writable")
    storage.write_bytes(place, b"raybert")
    storage.remove(place)


def _last_step(run_uri: str, patience: float) -> int:
    def look() -> int:
        try:
            return last_step(run_uri)
        except InputError:
            raise
        except ValueError:
            return 0  # half written when the controller was killed; `repair` makes it again

    return retry(look, f"reading {run_uri}", seconds=patience)


def _classify(error: Exception, progress: bool) -> tuple[str, bool]:
    """What happened, and whether it would only happen again."""
    if isinstance(error, RayActorError):
        return "the controller of the run was lost", False
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        text = f"the controller failed ({faults.describe(cause)[1]})"
        return text, isinstance(cause, InputError) and not isinstance(cause, DamagedCheckpoint)
    failures = getattr(error, "worker_failures", {})
    causes = "; ".join(f"rank {rank} {faults.describe(cause)[1]}" for rank, cause in sorted(failures.items())[:3])
    # Ray Train has tried as often as it may.
    return causes or faults.describe(error)[1], not progress


class FaultLog(UserCallback):
    """Notes the workers' failures; lives in Ray Train's controller, where an exception would end the run."""

    def __init__(self, run_uri: str) -> None:
        self._run_uri = run_uri

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        # The end of the driver looks like this, too. Ray ends this process right after the workers; a placement group
        # that it made for the next group in between would never be removed.
        time.sleep(RESTART_PAUSE)
        try:
            found = {rank: faults.describe(error) for rank, error in worker_exceptions.items()}
            # When one rank is lost, the others' exchanges fail: that is no news.
            causes = {rank: what for rank, what in found.items() if what[0] not in ("error", "peer_lost")} or found
            for rank, (kind, text) in sorted(causes.items()):
                faults.note(self._run_uri, kind, f"rank {rank} {text}", rank=rank)
        except Exception:
            logger.exception("Cannot record the workers' failure")
