"""A pre-training run as its driver sees it: everything that can be checked before the first step, then TorchTrainer."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import yaml

from raybert import storage, trackers
from raybert.cluster import Shares, largest_resources, plan_shares
from raybert.config import Config, from_mapping
from raybert.data.shards import ShardSet, open_shards, verify_shards
from raybert.errors import InputError, Interrupted, RunFailed
from raybert.model import files
from raybert.probe import client
from raybert.probe.tasks import ProbeTask, load_task
from raybert.train.memory import WORKER_ENVIRONMENT

# "auto" verifies every hash of a shard set up to this size, about a minute of reading from a bucket.
FULL_VERIFY_BYTES = 4 * 2**30

# A resumed run must see the same batches and the same model. Its length, cadences and resources may change.
FIXED = ("data.seed", "model", "train.global_batch", "train.seed")


class Diverged(RunFailed):
    """The loss is no number any more, or far above where it began."""


@dataclass(frozen=True)
class Run:
    """A run whose settings, data and resources fit together."""

    config: Config
    shards: ShardSet
    shares: Shares
    tasks: list[ProbeTask]

    @property
    def uri(self) -> str:
        return self.config.run_uri


def check(config: Config, *, reserved_cpus: float = 0.0, hashes_known: bool = False) -> Run:
    """Verify all that can be known before training, with Ray connected. Nothing is written.

    Args:
        reserved_cpus: CPUs that others hold.
        hashes_known: the shards' hashes were verified by who planned this run; their sizes are enough.

    Raises:
        InputError: the shards are missing, damaged or made for another tokenizer, too long for the model or too few
            for a batch; a probe task is wrong; the cluster can never hold the workers; the run's name is taken by a
            run that is different; the run's storage cannot be written to.
    """
    if not config.data.shards:
        raise InputError("data.shards is not set: give the directory that `raybert prepare --output` wrote.")
    storage.require_writable(config.run.storage)
    shards = open_shards(config.data.shards)
    positions = config.model.bert().max_position_embeddings
    if shards.seq_len > positions:
        raise InputError(
            f"The shards in {shards.uri} hold windows for {shards.seq_len} tokens and the model has "
            f"{positions} positions; set model.max_position_embeddings={shards.seq_len} or prepare with "
            f"--seq-len {positions}."
        )
    if not shards.rows("train"):
        raise InputError(f"The shard set {shards.uri} has no training rows.")
    sizes_only = config.data.verify == "sizes" or (config.data.verify == "auto" and shards.bytes > FULL_VERIFY_BYTES)
    verify_shards(shards, sizes_only=sizes_only or hashes_known)
    tasks = [load_task(task) for task in config.probe.tasks]
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"probe.tasks names {twice[0]} twice, and the records of both would share their files; leave one out, or "
            "give it another name."
        )
    cpus, gpus = largest_resources()
    shares = plan_shares(
        cpus,
        gpus,
        workers=config.train.worker_range[0],
        worker_cpus=config.train.worker_cpus,
        task_cpus=config.data.task_cpus,
        probe_cpus=config.probe.cpus,
        use_gpu=config.train.use_gpu,
        reserved=reserved_cpus,
    )
    check_probe_gpus(config, shares, gpus)
    _check_resume(config, shards)
    _check_start(config)
    trackers.require(config.run.trackers, config.run_uri)
    return Run(config, shards, shares, tasks)


def check_probe_gpus(config: Config, shares: Shares, gpus: float) -> None:
    """
    Raises:
        InputError: the training workers hold GPUs that probes would wait for until the run is over.
    """
    held = config.train.worker_range[0] if shares.use_gpu else 0
    if config.probe.gpus and held + config.probe.gpus > gpus:
        raise InputError(
            f"probe.gpus={config.probe.gpus:g} cannot be had beside {held} workers with a GPU each: the cluster can "
            f"have at most {gpus:g} GPUs. Set probe.gpus=0, lower train.workers or set train.use_gpu=false."
        )


def _check_start(config: Config) -> None:
    """The checkpoint that a run starts from must have the dimensions that the settings ask for."""
    uri = config.model.start_from
    if not uri:
        return
    with storage.local_copy(uri, [files.CONFIG]) as directory:
        found = asdict(files.read_config(directory, uri))
    wanted = asdict(config.model.bert())
    for name, value in wanted.items():
        # Dropout and the spread of new weights belong to the run, not to the weights.
        if found[name] == value or name in ("dropout", "initializer_range"):
            continue
        remedy = (
            f"set model.{name}={found[name]}"
            if name in type(config.model).model_fields
            else "only a model with raybert's own vocabulary and layer norm can be trained further"
        )
        raise InputError(f"model.start_from={uri} has {name}={found[name]} and this run asks for {value}; {remedy}.")


def _check_resume(config: Config, shards: ShardSet) -> None:
    recorded = storage.join(config.run_uri, "config.yaml")
    if not storage.exists(recorded):
        return
    tree = yaml.safe_load(storage.read_bytes(recorded))
    about = tree.pop("about", {})
    before = from_mapping(tree).model_dump(mode="json")
    now = config.model_dump(mode="json")
    if about.get("manifest") != shards.manifest_hash:
        raise InputError(
            f"The run {config.run_uri} was trained on other shards than {shards.uri}; "
            "give this run another run.name, or the shards it began with."
        )
    for key in FIXED:
        old, new = _lookup(before, key), _lookup(now, key)
        if old != new:
            raise InputError(
                f"The run {config.run_uri} exists with {key}={old} and cannot go on with {new}; "
                "give this run another run.name, or the setting it began with."
            )


def _lookup(tree: dict[str, Any], dotted: str) -> Any:
    value: Any = tree
    for part in dotted.split("."):
        value = value[part]
    return value


def train(run: Run, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train until the last step. A run that was begun before goes on from its newest checkpoint.

    Args:
        callbacks: Ray Train's `UserCallback`s; they are told of every report.

    Returns:
        The metrics that were reported last (empty if nothing was reported in this call).

    Raises:
        RunFailed: the run failed too often without a new checkpoint, or the loss diverged.
        Interrupted: a signal ended the run before its last step, with a checkpoint.
    """
    from raybert.train.ingest import last_step
    from raybert.train.loop import FAILURE
    from raybert.train.recover import repair
    from raybert.train.stop import requested, until_signal
    from raybert.train.supervise import keep_going

    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    # The controller takes a report at each of its polls. At its default of 2 seconds a job that is stopped, and killed
    # 3 seconds later, would not get its last checkpoint committed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    config = run.config
    _write_config(run)
    storage.remove(storage.join(run.uri, FAILURE))
    repair(run.uri)
    if last_step(run.uri) >= config.train.steps:
        return {}
    if run.tasks and config.every.probe:
        client.serve(run.uri, config.run.storage)
    result = until_signal(
        run.uri,
        lambda: keep_going(
            lambda: _trainer(run, callbacks).fit(),
            run.uri,
            max_failures=config.train.max_failures,
            patience=config.run.patience,
        ),
    )
    failure = storage.join(run.uri, FAILURE)
    if storage.exists(failure):
        found = storage.read_json(failure)
        raise Diverged(found["reason"]) if found["kind"] == "diverged" else RunFailed(found["reason"])
    if requested(run.uri) and (done := last_step(run.uri)) < config.train.steps:
        raise Interrupted(f"{run.uri} is saved at step {done}; the same command goes on from there.")
    return result.metrics or {}


def _trainer(run: Run, callbacks: Sequence[Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    from raybert.train.elastic import ElasticTrainer
    from raybert.train.ingest import IngestConfig, placeholder
    from raybert.train.loop import train_loop
    from raybert.train.supervise import FaultLog

    config = run.config
    return ElasticTrainer(
        run.uri,
        config.train.worker_counts,
        run.shares.data_task,
        train_loop_per_worker=train_loop,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "tasks": [task.model_dump(mode="json") for task in run.tasks],
            "probe_cpus": run.shares.probe,
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
            worker_runtime_env={} if run.shares.use_gpu else {"env_vars": WORKER_ENVIRONMENT},
        ),
        datasets={"train": partial(placeholder, run.uri, config.run.patience)},
        dataset_config=IngestConfig(
            run_uri=run.uri,
            shards_uri=config.data.shards,
            seed=config.data.seed,
            global_batch=config.train.global_batch,
            steps=config.train.steps,
            task_cpus=run.shares.data_task,
            patience=config.run.patience,
        ),
    )


def _write_config(run: Run) -> None:
    packages = ("raybert", "torch", "ray", "pyarrow", "numpy", "tiktoken", "scikit-learn")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    about = {"about": {"versions": versions, "manifest": run.shards.manifest_hash, "seq_len": run.shards.seq_len}}
    text = run.config.to_yaml() + yaml.safe_dump(about, sort_keys=False)
    storage.write_bytes(storage.join(run.uri, "config.yaml"), text.encode())
