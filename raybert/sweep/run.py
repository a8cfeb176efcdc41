"""A sweep on Ray Tune: light drivers, each of which runs one trial with TorchTrainer, stopped early by ASHA."""

import math
import os
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from raybert import storage, trackers
from raybert.cluster import OFF_SPOT, largest_resources
from raybert.data.shards import open_shards
from raybert.dry_run import Estimate, estimate
from raybert.errors import InputError, RunFailed
from raybert.sweep.space import SweepConfig, Trial, trials
from raybert.train.run import Diverged, Run, check, train

# A trial's driver waits for its run and computes nothing; Tune does not take 0.
DRIVER_CPUS = 0.01


class ValidationReports(TuneReportCallback):
    """Passes on the reports that have a validation loss: those that trials are compared by."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if "validation_loss" in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


def run_sweep(sweep: SweepConfig, *, resume: bool = False) -> list[Trial]:
    """Run every trial to its end, or to where ASHA stops it. Ray must be connected.

    Args:
        resume: go on with a sweep that was broken off; what is finished is not run again.

    Returns:
        The trials, whatever became of each; `raybert.sweep.summary` reads it from their directories.

    Raises:
        InputError: a trial will not do or could never run; the sweep exists and `resume` is false, or the reverse.
        RunFailed: not one trial could be trained.
    """
    planned = trials(sweep)
    state = storage.arrow_uri(storage.join(sweep.uri, "tune"))
    exists = storage.exists(storage.join(sweep.uri, "sweep.json"))
    if exists and not resume:
        raise InputError(f"The sweep {sweep.uri} exists; go on with it by --resume, or give this one another name.")
    if resume and not exists:
        raise InputError(f"There is no sweep {sweep.uri} to resume.")
    described = {"points": [dict(trial.point) for trial in planned]}
    if resume and storage.read_json(storage.join(sweep.uri, "sweep.json")) != described:
        raise InputError(f"The sweep {sweep.uri} was begun with another space; resume it with the file it began with.")
    concurrent = _check_trials(planned, sweep.max_concurrent)
    storage.write_json(storage.join(sweep.uri, "sweep.json"), described)
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    placed = tune.PlacementGroupFactory([{"CPU": DRIVER_CPUS}], bundle_label_selector=[OFF_SPOT])
    trainable = tune.with_resources(_trainable(planned), placed)
    # A sweep that was broken off before Tune wrote anything down begins anew; its trials' runs go on by themselves.
    if resume and tune.Tuner.can_restore(state):
        tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(range(len(planned))))},
            tune_config=tune.TuneConfig(
                metric="validation_loss",
                mode="min",
                scheduler=_scheduler(sweep, planned),
                max_concurrent_trials=concurrent,
                trial_dirname_creator=lambda trial: planned[trial.config["trial"]].name,
            ),
            run_config=tune.RunConfig(name="tune", storage_path=storage.arrow_uri(sweep.uri), verbose=1),
        )
    results = tuner.fit()
    if len(results.errors) == len(planned):
        raise RunFailed(f"No trial of {sweep.uri} could be trained; the first one: {_last(results.errors[0])}.")
    return planned


def estimate_sweep(sweep: SweepConfig) -> tuple[list[tuple[str, dict[str, Any], Estimate]], int]:
    """What each trial would take, measured once for each that asks for something else, and how many run at a time.

    Raises:
        InputError: a trial will not do or could never run.
        RunFailed: a measurement failed.
    """
    planned = trials(sweep)
    concurrent = _check_trials(planned, sweep.max_concurrent)
    seen: dict[str, Estimate] = {}
    rows = []
    for trial in planned:
        key = repr((trial.config.data, trial.config.model, trial.config.train))
        if key not in seen:
            seen[key] = estimate(check(trial.config, reserved_cpus=DRIVER_CPUS, hashes_known=True))
        rows.append((trial.name, dict(trial.point), seen[key]))
    return rows, concurrent


def _last(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


def _trainable(planned: list[Trial]) -> Callable[[dict[str, Any]], None]:
    def run_trial(point: dict[str, Any]) -> None:
        trial = planned[point["trial"]]
        run = check(trial.config, reserved_cpus=DRIVER_CPUS, hashes_known=True)
        try:
            with trackers.following(run.config):
                train(run, [ValidationReports()])
        except Diverged:
            return  # the trial's result, recorded in its directory; no fault of the sweep

    return run_trial


def _check_trials(planned: list[Trial], most: int | None) -> int:
    """Refuse what could never run, and say how many trials fit beside each other."""
    cpus, gpus = largest_resources()
    runs: list[Run] = []
    seen: dict[str, Run] = {}
    for trial in planned:
        # Shards are verified once, resources for every trial that differs in what it asks for.
        key = repr((trial.config.data, trial.config.model, trial.config.train))
        if key not in seen:
            seen[key] = check(trial.config, reserved_cpus=DRIVER_CPUS)
        runs.append(seen[key])
    fits = min(math.floor(_fits(run, cpus, gpus)) for run in runs)
    return max(1, min(fits, most or fits, len(planned)))


def _fits(run: Run, cpus: float, gpus: float) -> float:
    """How many runs like this one the cluster can hold at a time, with a data task, or two, and a probe each."""
    workers = run.config.train.worker_range[1]
    need = workers * run.shares.worker + 2 * run.shares.data_task + run.shares.probe + DRIVER_CPUS
    return min(cpus / need, gpus / workers) if run.shares.use_gpu else cpus / need


def _scheduler(sweep: SweepConfig, planned: list[Trial]) -> TrialScheduler:
    if not sweep.asha.enabled:
        return FIFOScheduler()
    tokens = max(_tokens(trial) for trial in planned)
    return AsyncHyperBandScheduler(
        time_attr="tokens",
        max_t=tokens,
        grace_period=max(1, int(sweep.asha.grace_fraction * tokens)),
        reduction_factor=sweep.asha.reduction_factor,
    )


def _tokens(trial: Trial) -> int:
    """Positions that the trial trains on, as its reports count them."""
    return trial.config.train.steps * trial.config.train.global_batch * open_shards(trial.config.data.shards).seq_len
