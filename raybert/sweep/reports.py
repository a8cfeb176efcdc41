"""What trials tell Tune as they go, so that the worse ones are stopped early."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from raybert.config_sections import VALIDATION_LOSS
from raybert.probe import metrics
from raybert.records import read_metrics
from raybert.report.watch import Subscriber, watching
from raybert.storage.retry import retry
from raybert.sweep.summary import note_end
from raybert.train.check import Run

# Seconds that storage may be away when Tune has stopped a trial.
PATIENCE = 60.0


class ValidationReports(TuneReportCallback):
    """Passes on the reports that have a validation loss.

    The one of the last step is left out. Nothing is saved by stopping a trial there, and it has to end cleanly:
    its last probe may not be queued yet.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if VALIDATION_LOSS in metrics[0] and metrics[0]["step"] < self._steps:
            super().after_report(run_context, metrics, checkpoint)


def probe_report(metric: str, record: Mapping[str, Any], *, steps: int, tokens: int) -> dict[str, Any] | None:
    """A probe record as Tune is told of it; None where it says nothing of the metric.

    As with validations the last step is left out, and so is the start.

    Args:
        steps: of the whole run.
        tokens: of a step, as `Saver.save` reports them.
    """
    value, step = metrics.value(metric, record), record["step"]
    return {"step": step, "tokens": step * tokens, metric: value} if value is not None and 0 < step < steps else None


@contextmanager
def reporting(metric: str, run: Run) -> Iterator[Sequence[Any]]:
    """Have Tune told of the metric inside the ``with``, where `run` is trained with these callbacks."""
    if metric == VALIDATION_LOSS:
        yield [ValidationReports(run.config.train.steps)]
        return
    queue, train = TuneReportCallback(), run.config.train

    def tell(record: dict[str, Any]) -> None:
        found = probe_report(metric, record, steps=train.steps, tokens=train.global_batch * run.shards.seq_len)
        if found is not None:
            queue.after_report(None, [found], None)

    # History: an earlier attempt may have ended before its probes were done.
    with watching(run.uri, [Subscriber("sweep's report", on_probe=tell, history=True)]):
        yield []


class Asha(AsyncHyperBandScheduler):
    """Notes in the directory of a trial that it was pruned, and prunes none that has come to its last step.

    Args:
        trials: of each its run's URI and the steps that it trains.
    """

    def __init__(self, trials: Sequence[tuple[str, int]], **options: Any) -> None:
        super().__init__(**options)
        self._trials = trials

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            uri, steps = self._trials[trial.config["trial"]]
            # A probe tells of a step long after it: the last checkpoint may be under way, and is not to be cut off.
            records = retry(lambda: read_metrics(uri), f"reading the steps of {uri}", seconds=PATIENCE)
            if max((record["step"] for record in records), default=0) >= steps:
                return str(TrialScheduler.CONTINUE)
            retry(lambda: note_end(uri, "pruned"), f"recording the end of {uri}", seconds=PATIENCE)
        return decision
