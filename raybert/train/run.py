"""A pre-training run as its driver sees it: TorchTrainer, begun again where it can be, and how it ended."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from functools import partial
from typing import Any

import yaml

from raybert import storage
from raybert.config import look_up, read_yaml_mapping
from raybert.errors import Interrupted, RunFailed
from raybert.probe.service import client
from raybert.probe.suites import load_suite
from raybert.ray_internals import names
from raybert.records import FAILURE, read_failure
from raybert.spectral import table
from raybert.storage import lease
from raybert.storage.retry import retry
from raybert.train.check import Run
from raybert.train.memory import worker_environment

# What Ray Train takes from the driver's environment. A controller takes a report at each of its polls. At the default
# of 2 seconds a job that is stopped, and killed 3 seconds later, would not get its last checkpoint committed.
CONTROLLER_DEFAULTS = {
    names.STATE_TRACKING: "1",
    names.PREEMPTION_POLL_SECONDS: "1",
    names.HEALTH_CHECK_SECONDS: "0.5",
}


class Diverged(RunFailed):
    """The loss is not a number any more, or far above where it began."""


def train(run: Run, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train until the last step. An existing run resumes from its newest checkpoint.

    Args:
        callbacks: Ray Train's `UserCallback`s, called at every report.

    Returns:
        The metrics that were reported last (empty if nothing was reported in this call).

    Raises:
        InputError: another driver is running this run.
        RunFailed: the run failed too often without a new checkpoint, or the loss diverged.
        Interrupted: a signal ended the run before its last step, with a checkpoint.
    """
    with lease.held(run.uri):
        return _train(run, callbacks)


def _train(run: Run, callbacks: Sequence[Any]) -> dict[str, Any]:
    from raybert.train.recovery.committed import last_step
    from raybert.train.recovery.placement_groups import removed_meanwhile
    from raybert.train.recovery.repair import remove_incomplete_checkpoints, repair
    from raybert.train.recovery.stop import requested, until_signal
    from raybert.train.recovery.supervise import fit_with_restarts

    for name, value in CONTROLLER_DEFAULTS.items():
        os.environ.setdefault(name, value)
    config = run.config
    storage.remove(storage.join(run.uri, FAILURE))
    repair(run.uri)
    done = last_step(run.uri)
    _write_config(run, done)
    if done >= config.train.steps:
        return {}
    # Also for a run that has a checkpoint: it begins anew when that turns out to be damaged.
    token_vectors = table.for_run(config, run.shards, cpus=run.shares.worker)
    if run.tasks and config.every.probe:
        client.serve(run.uri, config.run.storage)
    with removed_meanwhile():
        result = until_signal(
            run.uri,
            lambda: fit_with_restarts(
                lambda: _trainer(run, token_vectors, callbacks).fit(),
                run.uri,
                max_failures=config.train.max_failures,
                patience=config.run.patience,
            ),
        )
    # Ray Train deletes old checkpoints once, and goes on when the storage is away at that moment.
    retry(lambda: remove_incomplete_checkpoints(run.uri), f"cleaning up {run.uri}", seconds=config.run.patience)
    if failure := read_failure(run.uri):
        raise Diverged(failure["reason"]) if failure["kind"] == "diverged" else RunFailed(failure["reason"])
    if requested(run.uri) and (done := last_step(run.uri)) < config.train.steps:
        raise Interrupted(f"{run.uri} is saved at step {done}; rerun the same command to resume.")
    return result.metrics or {}


def _trainer(run: Run, token_vectors: str, callbacks: Sequence[Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    from raybert.data.spec import sample_spec
    from raybert.data.stream import StreamSpec
    from raybert.train.ingest import IngestConfig, placeholder
    from raybert.train.loop import train_loop
    from raybert.train.recovery.elastic import ElasticTrainer
    from raybert.train.recovery.supervise import FaultLog

    config = run.config
    spec = StreamSpec(
        shards_uri=config.data.shards,
        manifest=run.shards.manifest_hash,
        seed=config.data.seed,
        global_batch=config.train.global_batch,
        steps=config.train.steps,
        task_cpus=run.shares.data_task,
        samples=sample_spec(config, run.shards.vocabulary),
        retry_seconds=config.run.patience,
    )
    return ElasticTrainer(
        run.uri,
        config.train.worker_counts,
        run.shares.data_task,
        train_loop_per_worker=train_loop,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "tasks": [task.model_dump(mode="json") for task in run.tasks],
            "probe_cpus": run.shares.probe,
            "manifest": run.shards.manifest_hash,
            "token_vectors": token_vectors,
        },
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=run.shares.use_gpu,
            resources_per_worker={"CPU": run.shares.worker} | ({"GPU": 1} if run.shares.use_gpu else {}),
            elastic_resize_monitor_interval_s=config.train.resize_seconds,
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=storage.arrow_uri(config.run.storage),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep_last),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            callbacks=[FaultLog(run.uri), *callbacks],
            worker_runtime_env={"env_vars": worker_environment(run.shares.use_gpu)},
        ),
        datasets={"train": partial(placeholder, run.uri, config.run.patience)},
        dataset_config=IngestConfig(run.uri, spec),
    )


def _write_config(run: Run, done: int) -> None:
    """The resolved settings, and what they are about. What is due when may be another thing than before: `cadences` is
    the step behind which the present ones hold.
    """
    uri = storage.join(run.uri, "config.yaml")
    before = read_yaml_mapping(uri) if storage.exists(uri) else {}
    now = run.config.model_dump(mode="json")
    same = all(look_up(before, key) == look_up(now, key) for key in ("every", "probe.tasks"))
    cadences = before.get("about", {}).get("cadences", 0) if same else done
    packages = ("raybert", "torch", "ray", "pyarrow", "numpy", "tiktoken", "scikit-learn")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    about: dict[str, Any] = {"versions": versions, "manifest": run.shards.manifest_hash, "seq_len": run.shards.seq_len}
    if run.config.probe.suite and run.tasks:
        about["suite"] = _suite(run)
    text = run.config.to_yaml() + yaml.safe_dump({"about": about | {"cadences": cadences}}, sort_keys=False)
    storage.write_bytes(uri, text.encode())


def _suite(run: Run) -> dict[str, Any]:
    """The suite's name and the names of its tasks, whose average is shown."""
    suite = load_suite(run.config.probe.suite)
    by_spec = dict(zip(run.config.probe.tasks or [], (task.name for task in run.tasks), strict=True))
    return {"name": suite.name, "tasks": [by_spec[spec] for spec in suite.tasks]}
