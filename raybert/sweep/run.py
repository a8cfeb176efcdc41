"""A sweep on Ray Tune: light drivers, each of which runs one trial with TorchTrainer, stopped early by ASHA."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raybert import storage
from raybert.cluster import OFF_SPOT, largest_resources
from raybert.config import Config, warmup_steps
from raybert.config_sections import NEIGHBOURS, VALIDATION_LOSS
from raybert.data.shards import open_shards
from raybert.errors import InputError, Interrupted, last_line
from raybert.probe import metrics
from raybert.probe.service import client
from raybert.ray_internals.names import STATE_TRACKING
from raybert.ray_internals.train import withhold_from_trials
from raybert.records import END, read_object
from raybert.report import trackers
from raybert.spectral import table
from raybert.storage import lease
from raybert.sweep.reports import Asha, reporting
from raybert.sweep.space import SweepConfig, Trial, trials
from raybert.sweep.stop import INTERRUPTED, LetSave, asked, interruptible
from raybert.sweep.summary import note_end
from raybert.train.check import Run, check, check_shards, probe_tasks
from raybert.train.dry_run import Estimate, estimate
from raybert.train.recovery import stop
from raybert.train.run import Diverged, train

# A trial's driver waits for its run and computes nothing; Tune does not take 0.
DRIVER_CPUS = 0.01


# What a sweep that was broken off may go on with; everything else must be as it was, or trials could not be compared.
MAY_CHANGE = (
    "run.name",
    "run.storage",
    "run.patience",
    "data.task_cpus",
    "train.workers",
    "train.worker_cpus",
    "train.use_gpu",
    "train.max_failures",
    "train.hang_factor",
    "train.hang_seconds",
    "train.resize_seconds",
    "probe.cpus",
    "probe.gpus",
    "probe.workers",
)


def check_data(sweep: SweepConfig, planned: Sequence[Trial]) -> None:
    """Look at the manifests of the shard sets that the trials read, which needs no Ray.

    Raises:
        InputError: a shard set is missing, does not fit a trial's model, or has no windows to validate with; the
            trials' losses cannot be compared; or a trial's probes do not measure the sweep's metric.
    """
    configs = [trial.config for trial in planned]
    _require_one_loss(configs)
    tokenizers: dict[str, str] = {}
    for config in {(c.data.shards, c.model): c for c in configs}.values():
        _, shards = check_shards(config)
        if not shards.rows("validation"):
            raise InputError(
                f"A sweep compares validation losses, but the shard set {shards.uri} has no validation windows; "
                "prepare again with more documents or a larger --validation-fraction."
            )
        tokenizers.setdefault(shards.tokenizer_hash, shards.uri)
    if len(tokenizers) > 1:
        one, other, *_ = tokenizers.values()
        raise InputError(
            f"A sweep compares validation losses, but losses per token are not comparable between {one} and "
            f"{other}, which were prepared with different tokenizers; run a sweep for each, and compare their "
            "probes."
        )
    if sweep.metric != VALIDATION_LOSS:
        for config in {(c.data.shards, repr(c.probe), c.every.probe): c for c in configs}.values():
            metrics.check("metric", sweep.metric, probe_tasks(config))


def _require_one_loss(configs: Sequence[Config]) -> None:
    """The validation loss must mean the same in all trials: by it they are stopped early, and the best is found."""
    first = configs[0]
    for config in configs[1:]:
        for key in type(config.objective).model_fields:
            if getattr(config.objective, key) != getattr(first.objective, key):
                raise InputError(
                    f"A sweep compares validation losses, but objective.{key} changes the loss itself; run a "
                    "sweep for each value, and compare their probes."
                )
        if config.train.micro_batch != first.train.micro_batch and config.fixes_micro_batch:
            raise InputError(
                "A sweep compares validation losses, but with this objective they depend on train.micro_batch; "
                "run a sweep for each value, and compare their probes."
            )


def run_sweep(sweep: SweepConfig, *, resume: bool = False) -> list[Trial]:
    """Run every trial to its end, or to where ASHA stops it. Ray must be connected.

    Args:
        resume: resume an interrupted sweep; finished trials are not run again, failed ones are.

    Returns:
        The trials, whatever became of each; `raybert.sweep.summary` reads it from their directories.

    Raises:
        InputError: a trial is invalid or could never run; the sweep exists and `resume` is false, or the reverse, or
            it was begun with other settings, or another driver is at it.
        Interrupted: a signal ended the sweep; the trials that were under way have saved.
    """
    planned = trials(sweep)
    record = storage.join(sweep.uri, "sweep.json")
    exists = storage.exists(record)
    if exists and not resume:
        raise InputError(
            f"The sweep {sweep.uri} already exists; resume it with --resume, or give this one another name."
        )
    if resume and not exists:
        raise InputError(f"There is no sweep {sweep.uri} to resume.")
    described = _describe(sweep, planned)
    if resume:
        try:
            before = read_object(record)
        except ValueError as error:
            raise InputError(
                f"{record} is damaged ({error}), so the settings that the sweep started with are unknown; give "
                "this sweep another name."
            ) from error
        _require_same(sweep, before, described)
    concurrent = _check_trials(planned, sweep.max_concurrent)
    with lease.held(sweep.uri):
        storage.write_json(record, described)
        _make_token_vectors(planned)
        with interruptible(_trials_uri(sweep)):
            results = _tuner(sweep, planned, concurrent, resume=resume).fit()
            _note_failures(results, planned)
            if asked():
                raise Interrupted(f"rerun the same command with --resume to resume {sweep.uri}.")
    return planned


def _make_token_vectors(planned: Sequence[Trial]) -> None:
    """Once, before trials need them at the same time: they find them beside the shards or above their directories."""
    spectral = [trial.config for trial in planned if trial.config.model.needs_vectors]
    for config in {(config.data.shards, config.data.seed): config for config in spectral}.values():
        table.for_run(config, open_shards(config.data.shards), cpus=1.0, show=True, shared=True)


def _describe(sweep: SweepConfig, planned: Sequence[Trial]) -> dict[str, Any]:
    """What makes the sweep what it is: a flat mapping, with all defaults written out."""
    base = trackers.flatten(planned[0].config.model_dump(mode="json"))
    kept = {f"base.{key}": value for key, value in base.items() if key not in (*MAY_CHANGE, *sweep.space)}
    own = sweep.model_dump(mode="json", exclude={"name", "storage", "base", "space"})
    return {"points": [dict(trial.point) for trial in planned], **trackers.flatten(own), **kept}


def _require_same(sweep: SweepConfig, before: dict[str, Any], now: dict[str, Any]) -> None:
    if _numbers(before.get("points", [])) != _numbers(now["points"]):
        raise InputError(
            f"The sweep {sweep.uri} was started with another space; resume it with the file it was started with."
        )
    # A setting that is younger than the sweep had no other value than its default.
    defaults = {f"base.{key}": value for key, value in trackers.flatten(Config().model_dump(mode="json")).items()}
    defaults["metric"] = VALIDATION_LOSS
    before, now = _own_probe_unset(_in_steps(before)), _own_probe_unset(_in_steps(now))
    for key in sorted(before.keys() | now.keys()):
        if (old := before.get(key, defaults.get(key))) != now.get(key):
            raise InputError(
                f"The sweep {sweep.uri} was started with {key}={old} and cannot be resumed with {now.get(key)}; "
                "resume it with the settings it was started with."
            )


def _own_probe_unset(described: dict[str, Any]) -> dict[str, Any]:
    """The same with the probe of the shards' own text as what it is by default: it was written out once."""
    own = described.get("base.probe.tasks") == [NEIGHBOURS]
    return described | {"base.probe.tasks": None} if own else described


def _in_steps(described: dict[str, Any]) -> dict[str, Any]:
    """The same with the warm-up in steps, which may be given as a fraction of the run."""
    given, steps = described.get("base.schedule.warmup_steps"), described.get("base.train.steps")
    if given is None or steps is None:
        return described
    return described | {"base.schedule.warmup_steps": warmup_steps(given, steps)}


def _numbers(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points with their numbers as such: older sweeps have noted ``1e-3`` as a text."""

    def number(value: Any) -> Any:
        try:
            return float(value)
        except (TypeError, ValueError):
            return value

    return [{key: number(value) for key, value in point.items()} for point in points]


def _trials_uri(sweep: SweepConfig) -> str:
    return storage.join(sweep.uri, "trials")


def _tuner(sweep: SweepConfig, planned: list[Trial], concurrent: int, *, resume: bool) -> tune.Tuner:
    os.environ.setdefault(STATE_TRACKING, "1")
    state = storage.arrow_uri(storage.join(sweep.uri, "tune"))
    placed = tune.PlacementGroupFactory([{"CPU": DRIVER_CPUS}], bundle_label_selector=[OFF_SPOT])
    # Ray writes a trial's environment into its logs. Credentials come by the default chain of each node, not by Tune.
    withhold_from_trials("AWS_")
    trainable = tune.with_resources(_trainable(sweep.metric, planned), placed)
    # A sweep that was broken off before Tune wrote anything down begins anew; its trials' runs go on by themselves.
    if resume and tune.Tuner.can_restore(state):
        return tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True)
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(range(len(planned))))},
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode="min" if sweep.metric == VALIDATION_LOSS else "max",
            scheduler=_scheduler(sweep, planned),
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: planned[trial.config["trial"]].name,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=storage.arrow_uri(sweep.uri), verbose=1, callbacks=[LetSave()]
        ),
    )


def wait_for_probes(planned: Sequence[Trial], *, timeout: float | None = None) -> None:
    """Return when no checkpoint of a trial waits for its probe.

    Args:
        timeout: seconds, over all trials; None waits forever.

    Raises:
        RunFailed: the timeout has passed.
    """
    end = None if timeout is None else time.monotonic() + timeout
    for trial in planned:
        run = trial.config.run
        if trial.config.probe.tasks or not trial.config.probe.named or trial.config.probe.suite:
            left = None if end is None else max(0.0, end - time.monotonic())
            client.wait(trial.config.run_uri, run.storage, timeout=left)


def estimate_sweep(sweep: SweepConfig) -> tuple[list[tuple[str, dict[str, Any], Estimate]], int]:
    """What each trial would take, measured once for each that asks for something else, and how many run at a time.

    Raises:
        InputError: a trial is invalid or could never run.
        RunFailed: a measurement failed.
    """
    planned = trials(sweep)
    concurrent = _check_trials(planned, sweep.max_concurrent)
    seen: dict[str, Estimate] = {}
    rows = []
    for trial in planned:
        key = _asks_for(trial)
        if key not in seen:
            seen[key] = estimate(check(trial.config, reserved_cpus=DRIVER_CPUS, hashes_known=True))
        rows.append((trial.name, dict(trial.point), seen[key]))
    return rows, concurrent


def _note_failures(results: tune.ResultGrid, planned: Sequence[Trial]) -> None:
    for index in range(len(results)):
        result = results[index]
        if result.error and result.config and INTERRUPTED not in str(result.error):
            note_end(planned[result.config["trial"]].config.run_uri, "failed", _last(result.error))


def _last(error: BaseException) -> str:
    """The sentence at the end of a remote stack trace, which is ours where one of our errors is in it."""
    lines = reversed(str(error).splitlines())
    ours = next((line for line in lines if line.startswith("raybert.errors.")), None)
    return ours.partition(": ")[2] if ours else last_line(error)


def _trainable(metric: str, planned: list[Trial]) -> Callable[[dict[str, Any]], None]:
    def run_trial(point: dict[str, Any]) -> None:
        trial = planned[point["trial"]]
        uri = trial.config.run_uri
        if stop.requested(uri):
            raise RuntimeError(INTERRUPTED)
        run = check(trial.config, reserved_cpus=DRIVER_CPUS, hashes_known=True)
        try:
            with lease.held(uri), trackers.following(run.config):
                storage.remove(storage.join(uri, END))  # of an attempt that failed
                with reporting(metric, run) as callbacks:
                    train(run, callbacks)
        except Diverged:
            return  # the trial's result, recorded in its directory; no fault of the sweep
        except Interrupted as error:
            # To Tune this must be a failure, or it would not run the trial again.
            raise RuntimeError(INTERRUPTED) from error

    return run_trial


def _asks_for(trial: Trial) -> str:
    """Equal for trials that differ in nothing that is checked before they start."""
    config = trial.config
    return repr((config.data, config.model, config.train, config.objective, config.probe, config.run.trackers))


def _check_trials(planned: Sequence[Trial], most: int | None) -> int:
    """Refuse what could never run, and say how many trials fit beside each other."""
    cpus, gpus = largest_resources()
    found: dict[str, Run] = {}
    hashed: set[str] = set()
    for trial in planned:
        key = _asks_for(trial)
        if key not in found:
            shards = trial.config.data.shards
            found[key] = check(trial.config, reserved_cpus=DRIVER_CPUS, hashes_known=shards in hashed)
            hashed.add(shards)
    fits = min(math.floor(_fits(run, cpus, gpus)) for run in found.values())
    return max(1, min(fits, most or fits, len(planned)))


def _fits(run: Run, cpus: float, gpus: float) -> float:
    """How many runs like this one the cluster can hold at a time, with a data task, or two, and their probes."""
    workers = run.config.train.worker_range[1]
    probes = run.config.probe.workers * run.shares.probe
    need = workers * run.shares.worker + 2 * run.shares.data_task + probes + DRIVER_CPUS
    if not run.shares.use_gpu:
        return cpus / need
    return min(cpus / need, gpus / (workers + run.config.probe.workers * run.config.probe.gpus))


def _scheduler(sweep: SweepConfig, planned: list[Trial]) -> TrialScheduler:
    if not sweep.asha.enabled:
        return FIFOScheduler()
    lengths = {uri: open_shards(uri).seq_len for uri in {trial.config.data.shards for trial in planned}}
    # Positions that a trial trains on, as its reports count them.
    tokens = max(
        trial.config.train.steps * trial.config.train.global_batch * lengths[trial.config.data.shards]
        for trial in planned
    )
    return Asha(
        [(trial.config.run_uri, trial.config.train.steps) for trial in planned],
        time_attr="tokens",
        max_t=tokens,
        grace_period=max(1, int(sweep.asha.grace_fraction * tokens)),
        reduction_factor=sweep.asha.reduction_factor,
    )
