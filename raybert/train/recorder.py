"""What rank 0 writes down as the run goes: the ledger, the log and Ray's metrics. Other ranks write nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from raybert.config import Config
from raybert.storage.retry import retry
from raybert.telemetry import Gauges, MetricsLog
from raybert.train.clock import KINDS, Clock
from raybert.train.interval import Totals
from raybert.train.ledger import Ledger

T = TypeVar("T")


class Recorder:
    """Every rank has one and makes the same calls. `gauges` is None where nothing is written.

    Args:
        restored: the step of the checkpoint that this start of the worker group goes on from.
    """

    def __init__(self, config: Config, *, rank: int, world_size: int, restored: int, clock: Clock) -> None:
        self._config, self._world_size, self._restored, self._clock = config, world_size, restored, clock
        self._log = MetricsLog(config.run_uri) if rank == 0 else None
        self.gauges = Gauges(config.run_uri) if rank == 0 else None
        self._ledger: Ledger | None = None
        self._counted = restored  # the step up to which samples are in the counter

    def open_ledger(self) -> None:
        """Right before the first step: a run that was done already shows no trace of another start."""
        if self.gauges is not None:
            make = partial(Ledger, self._config.run_uri, restored=self._restored, workers=self._world_size)
            self._ledger = self._retry(make, "opening the ledger")
            self.gauges.set({"restarts": self._ledger.attempt - 1})

    def note(self, totals: Totals) -> None:
        """Add the steps of an interval to the ledger."""
        if self._ledger is not None:
            add = partial(self._ledger.add, totals.first, totals.digests, totals.skipped)
            with self._clock.waiting("report"):
                self._retry(add, "writing the ledger")

    def log(self, record: dict[str, Any], waits: dict[str, float]) -> None:
        """Write a line of the log, if there is something in it, with what was waited for in its interval."""
        if self._log is None or self.gauges is None or not record:
            return
        seconds = waits.get("seconds", 0.0)
        shares = {f"wait_{name}": waits[name] / seconds for name in KINDS if seconds}
        with self._clock.waiting("report"):
            self._retry(partial(self._log.write, {**record, **shares}), "writing the log")
        flat = {"validation_loss": record["validation"]["loss"]} if "validation" in record else {}
        self.gauges.set({**record, **flat})
        counted = {f"wait_{name}_seconds_total": waits.get(name, 0.0) for name in KINDS}
        samples = (record["step"] - self._counted) * self._config.train.global_batch
        self.gauges.add({**counted, "samples_total": samples})
        self._counted = record["step"]

    def flush(self) -> None:
        """Return when all that was noted lies in storage. A checkpoint is committed behind it, never before."""
        if self._ledger is not None and self._log is not None:
            self._retry(self._ledger.flush, "writing the ledger")
            self._retry(self._log.sync, "writing the log")

    def close(self) -> None:
        self._retry(self._close, "writing the log")

    def _close(self) -> None:
        for file in (self._ledger, self._log):
            if file is not None:
                file.close()

    def _retry(self, action: Callable[[], T], what: str) -> T:
        return retry(action, f"{what} of {self._config.run_uri}", seconds=self._config.run.patience)
