"""Everything about a pre-training run that can be checked before its first step."""

import importlib.util
import os
from dataclasses import asdict, dataclass
from typing import Any

from raybert import storage
from raybert.cluster import Shares, largest_resources, plan_shares
from raybert.config import Config, from_mapping, look_up
from raybert.config_sections import INITS, NEIGHBOURS
from raybert.config_text import read_overridden
from raybert.console import say
from raybert.data.shards import ShardSet, open_shards, read_unit, verify_shards
from raybert.errors import InputError
from raybert.probe import metrics
from raybert.probe.kind import ProbeTask
from raybert.probe.suites import load_suite
from raybert.probe.tasks import load_task
from raybert.spectral import recipe
from raybert.train.complete import Start, complete, start_of

# "auto" verifies every hash of a shard set up to this size, about a minute of reading from a bucket.
FULL_VERIFY_BYTES = 4 * 2**30

# A resumed run must see the same batches and the same model. Its length, cadences and resources may change.
FIXED = ("data.seed", "train.global_batch", "train.seed")


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


@dataclass(frozen=True)
class Inputs:
    """What a run reads: its shard set and its probe tasks; and its settings, complete."""

    config: Config
    shards: ShardSet
    tasks: list[ProbeTask]


def check_inputs(config: Config, *, hashes_known: bool = False) -> Inputs:
    """Verify all that can be known without a cluster. Nothing is written but an empty object that is removed again.

    Args:
        hashes_known: the shards' hashes were verified by who planned this run; their sizes are enough.

    Raises:
        InputError: the run's storage cannot be written to; the shards are missing, damaged or made for another
            tokenizer, or too long for the model; a probe task is wrong; the run's name is taken by a run that is
            different; the model that it starts from does not fit; a contrast has no negatives, token vectors cannot
            be learned from the shards, or there is no metric that `checkpoint.best` names.
    """
    config, shards, start = _check_shards(config)
    _check_validation(config, shards)
    storage.require_writable(config.run.storage)
    sizes_only = config.data.verify == "sizes" or (config.data.verify == "auto" and shards.bytes > FULL_VERIFY_BYTES)
    verify_shards(shards, sizes_only=sizes_only or hashes_known)
    tasks = _tasks(config)
    metrics.check("checkpoint.best", config.checkpoint.best, tasks)
    _check_resume(config, shards)
    if start is not None and start.lacks:
        where, lacking = config.model.start_from, ", ".join(start.lacks)
        say(f"{where} was saved without {lacking}; missing weights are initialised at random", style="yellow")
    if config.objective.pair == "contrastive":
        _check_contrast(shards, "train")
        if config.every.validation and shards.rows("validation"):
            _check_contrast(shards, "validation")
    if config.model.needs_vectors:
        recipe.check(shards, recipe.Recipe(config.data.seed), config.model.bert().hidden_size)
    _check_trackers(config)
    return Inputs(config, shards, tasks)


def check_shards(config: Config) -> tuple[Config, ShardSet]:
    """The run's shard set by its manifest alone, and the settings that it completes; no shard is read.

    Raises:
        InputError: it is missing, made for another tokenizer than the model that the run begins with, too long for the
            model, or has no training rows.
    """
    return _check_shards(config)[:2]


def _check_shards(config: Config) -> tuple[Config, ShardSet, Start | None]:
    """`check_shards`, and the model that the run begins with."""
    if not config.data.shards:
        raise InputError("data.shards is not set: give the directory that `raybert prepare --output` wrote.")
    shards, start = open_shards(config.data.shards), start_of(config)
    config = complete(config, shards, start)
    positions = config.model.bert().max_position_embeddings
    if shards.seq_len > positions:
        raise InputError(
            f"The shards in {shards.uri} hold windows for {shards.seq_len} tokens, but the model has {positions} "
            f"positions; set model.max_position_embeddings={shards.seq_len} or prepare with --seq-len {positions}."
        )
    if not shards.rows("train"):
        raise InputError(f"The shard set {shards.uri} has no training rows.")
    return config, shards, start


def _check_validation(config: Config, shards: ShardSet) -> None:
    # Whoever prepared with --validation-fraction 0 wants none.
    if config.every.validation and not shards.rows("validation") and shards.settings.get("validation_fraction") != 0:
        raise InputError(
            f"The shard set {shards.uri} has no validation windows for every.validation={config.every.validation}; set "
            "every.validation=0 to train without validation, or prepare again with more documents or a larger "
            "--validation-fraction."
        )


def _check_contrast(shards: ShardSet, split: str) -> None:
    documents: set[int] = set()
    for unit in shards.units(split):
        documents |= set(read_unit(shards.uri, unit, shards.vocabulary).doc.tolist())
        if len(documents) > 1:
            return
    whose, remedy = {
        "train": ("", "prepare the text as several documents"),
        "validation": ("validation ", "prepare again with a larger --validation-fraction, set every.validation=0"),
    }[split]
    raise InputError(
        f"All {whose}windows of the shard set {shards.uri} come from one document, so objective.pair=contrastive finds "
        f"no negatives; {remedy}, or set objective.pair=none."
    )


def probe_tasks(config: Config) -> list[ProbeTask]:
    """The tasks that the run will probe; with every.probe=0 none, and nothing is fetched.

    Raises:
        InputError: a task is wrong, or two have the same name.
    """
    if not config.every.probe:
        return []
    own = {NEIGHBOURS: f"{NEIGHBOURS}@{config.data.shards}"}
    tasks = [load_task(own.get(task, task)) for task in task_specs(config)]
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"probe.tasks names {twice[0]} twice, and the records of both would have the same file names; remove "
            "one, or give it another name."
        )
    return tasks


def task_specs(config: Config) -> list[str]:
    """The tasks of `probe.tasks` and of `probe.suite`, each once. Who names a suite has named tasks.

    Raises:
        InputError: there is no such suite.
    """
    if not config.probe.named:
        return [NEIGHBOURS]
    members = load_suite(config.probe.suite).tasks if config.probe.suite else []
    return [*(config.probe.tasks or []), *(task for task in members if task not in (config.probe.tasks or []))]


def _tasks(config: Config) -> list[ProbeTask]:
    """`probe_tasks`; a run that names none has no task where its shards lack text for its own."""
    try:
        return probe_tasks(config)
    except InputError as error:
        if config.probe.named:
            raise
        say(f"no probe: {error}", style="yellow")
        return []


def check(
    config: Config, *, inputs: Inputs | None = None, reserved_cpus: float = 0.0, hashes_known: bool = False
) -> Run:
    """Check everything that can be checked before training. Ray must be connected.

    Args:
        inputs: the result of `check_inputs`, if it was called before.
        reserved_cpus: CPUs that are not available to the run.
        hashes_known: as in `check_inputs`.

    Raises:
        InputError: as `check_inputs`; or the cluster can never hold the workers.
    """
    inputs = inputs or check_inputs(config, hashes_known=hashes_known)
    config = inputs.config
    cpus, gpus = largest_resources()
    shares = plan_shares(
        cpus,
        gpus,
        workers=config.train.worker_range[0],
        worker_cpus=config.train.worker_cpus,
        task_cpus=config.data.task_cpus,
        probe_cpus=config.probe.cpus,
        probes=config.probe.workers,
        use_gpu=config.train.use_gpu,
        reserved=reserved_cpus,
    )
    check_probe_gpus(config, shares, gpus)
    if config.every.probe:  # as resolved: with those of the suite, and without one that there is no text for
        specs = task_specs(config) if inputs.tasks else []
        config = config.model_copy(update={"probe": config.probe.model_copy(update={"tasks": specs})})
    return Run(config, inputs.shards, shares, inputs.tasks)


def check_probe_gpus(config: Config, shares: Shares, gpus: float) -> None:
    """
    Raises:
        InputError: the training workers hold GPUs that probes would wait for until the run is over.
    """
    held = config.train.worker_range[0] if shares.use_gpu else 0
    if config.probe.gpus and held + config.probe.gpus > gpus:
        raise InputError(
            f"probe.gpus={config.probe.gpus:g} does not fit alongside {held} workers with a GPU each: the cluster "
            f"can have at most {gpus:g} GPUs. Set probe.gpus=0, lower train.workers or set train.use_gpu=false."
        )


def _check_trackers(config: Config) -> None:
    """Every tracker's package must be there, and MLflow must not keep its database in a bucket."""
    names = config.run.trackers
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise InputError(f"run.trackers names {name}, which is not installed: pip install 'raybert[{name}]'.")
    if "mlflow" in names and storage.is_remote(config.run_uri) and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise InputError(
            f"run.trackers names mlflow, whose database cannot be stored in {config.run_uri}: set "
            "MLFLOW_TRACKING_URI to a server."
        )


def _check_resume(config: Config, shards: ShardSet) -> None:
    recorded = storage.join(config.run_uri, "config.yaml")
    if not storage.exists(recorded):
        return
    tree = read_overridden(recorded)
    about = tree.pop("about", None)
    if not isinstance(about, dict):  # a power loss leaves an empty file
        raise InputError(
            f"{recorded} is damaged: it does not say which shards the run was trained on. Restore a copy, or give "
            "this run another run.name."
        )
    manifest = about.get("manifest")
    began = from_mapping(tree)
    before, now = began.model_dump(mode="json"), config.model_dump(mode="json")
    # The model itself: an older run's settings do not state every dimension that these do.
    before["model"], now["model"] = _model(began), _model(config)
    if manifest != shards.manifest_hash:
        raise InputError(
            f"The run {config.run_uri} was trained on other shards than {shards.uri}; use those shards, or give "
            "this run another run.name."
        )
    fixed = [*FIXED, *(f"model.{key}" for key in now["model"]), *(f"objective.{key}" for key in now["objective"])]
    # Otherwise the masks of steps that are done would be others, and `verify` could not find them again.
    fixed += ["train.steps"] if config.objective.mlm_rate_end is not None else []
    fixed += ["train.micro_batch"] if config.fixes_micro_batch else []
    for key in fixed:
        old, new = look_up(before, key), look_up(now, key)
        if old != new:
            raise InputError(
                f"The run {config.run_uri} was started with {key}={old} and cannot be resumed with {new}; use the "
                "old value, or give this run another run.name."
            )


def _model(config: Config) -> dict[str, Any]:
    """What a run's model and its first weights follow from."""
    model = config.model
    begins = {key: getattr(model, key) for key in ("start_from", *INITS)}
    return asdict(model.bert()) | begins
