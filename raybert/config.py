"""Every setting of a run, typed. YAML files and dotted ``key.sub=value`` overrides become one checked ``Config``."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from raybert import storage
from raybert.config_sections import AbsolutePath as AbsolutePath  # for the settings of a sweep
from raybert.config_sections import (
    CheckpointConfig,
    DataConfig,
    EveryConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ProbeConfig,
    RunConfig,
    ScheduleConfig,
    Section,
    TrainConfig,
    ValidationConfig,
    warmup_steps,
)
from raybert.config_text import annotation_of, dump, read_overridden, set_dotted, set_key, typed
from raybert.config_text import look_up as look_up  # for those who read a run's settings
from raybert.config_text import read_yaml_mapping as read_yaml_mapping
from raybert.errors import InputError

# What a union adds to the place of a fault, which is no part of a key: train.workers.int.
_UNION_PART = re.compile(r"function-.*|constrained-.*|int|float|str|bool|(list|tuple|literal)\[.*")


class Config(Section):
    """All settings of a run, a field for each section."""

    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig(size="compact")
    train: TrainConfig = TrainConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    every: EveryConfig = EveryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    probe: ProbeConfig = ProbeConfig()

    @property
    def run_uri(self) -> str:
        """The run's directory."""
        return storage.join(self.run.storage, self.run.name)

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, also if it is given as a fraction of the run."""
        return warmup_steps(self.schedule.warmup_steps, self.train.steps)

    @property
    def fixes_micro_batch(self) -> bool:
        """Whether the micro-batch is part of the objective: it holds a contrast's negatives and the words of a bag."""
        return self.objective.pair == "contrastive" or self.objective.bag_weight > 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.objective.pair == "contrastive" and self.train.micro_batch < 2:
            raise ValueError(
                "objective.pair=contrastive takes its negatives from one micro-batch, and train.micro_batch=1 has "
                "none; raise train.micro_batch"
            )
        if self.schedule.warmup_steps > self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is more than train.steps={self.train.steps}; "
                "lower it, or give a fraction of the steps, such as 0.05"
            )
        return self

    def to_yaml(self) -> str:
        """All settings as a YAML file that `load` reads."""
        return dump(self.model_dump(mode="json"))


def load(path: str | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (local or any URI) and apply ``key.sub=value`` overrides.

    Raises:
        InputError: the file is missing or not a mapping, a key is unknown (the nearest real one is named), a value
            has the wrong type or does not fit the others.
    """
    tree = {} if path is None else _read_config(path)
    for override in overrides:
        set_dotted(tree, override)
    return from_mapping(tree)


def _read_config(path: str) -> dict[str, Any]:
    if not storage.exists(path):
        raise InputError(f"There is no config file {path}.")
    tree = read_overridden(path)
    tree.pop("about", None)  # what a run notes in its own config.yaml beside the settings
    return tree


def run_directory(uri: str) -> str:
    """The URI of a run's directory as it holds in every process.

    Raises:
        InputError: it is not a run directory.
    """
    run_uri = storage.absolute(uri)
    if not storage.exists(storage.join(run_uri, "config.yaml")):
        raise InputError(f"{uri} is not a run directory: it has no config.yaml. Give the storage/name of a run.")
    return run_uri


def load_run(run_uri: str, overrides: Iterable[str] = ()) -> Config:
    """The settings that a run was started with, wherever its directory lies now.

    Raises:
        InputError: it is not a run directory, or an override does not fit.
    """
    storage_uri, _, name = run_directory(run_uri).rpartition("/")
    path = storage.join(storage_uri, name, "config.yaml")
    tree = _read_config(path)
    set_key(tree, "run.storage", storage_uri)
    set_key(tree, "run.name", name)
    for override in overrides:
        set_dotted(tree, override)
    return from_mapping(tree)


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping and return the typed config.

    Raises:
        InputError: one sentence for the first fault.
    """
    if not isinstance(tree, Mapping):
        raise InputError(f"A config must be a mapping of sections, not {tree!r:.60}.")
    try:
        return Config.model_validate(typed(tree, Config))
    except ValidationError as error:
        raise explain(error, Config) from error


def explain(error: ValidationError, model: type[BaseModel]) -> InputError:
    """The first fault as a sentence; an unknown key names the nearest of the model's."""
    return InputError(_sentence(error, model))


def _sentence(error: ValidationError, model: type[BaseModel]) -> str:
    fault = error.errors()[0]
    path = ".".join(str(part) for part in fault["loc"] if not _UNION_PART.fullmatch(str(part)))
    message = fault["msg"].removeprefix("Value error, ").rstrip(".")
    if fault["type"] == "extra_forbidden":
        keys = all_keys(model) + _beside(fault["loc"], model)
        if path in keys:
            section, _, last = path.rpartition(".")
            return f"Unknown config key {path}. In a file, write {last} in the section {section}."
        near = difflib.get_close_matches(path, keys, n=1, cutoff=0.0)
        return f"Unknown config key {path}. Did you mean {near[0]}?"
    if fault["type"] == "value_error":
        return f"Bad config: {message}."
    if fault["type"] == "missing":
        return f"The config key {path} is missing."
    if fault["type"] == "list_type" and isinstance(fault["input"], str):
        return f"Bad config value {path}={fault['input']!r}: write a list, [{fault['input']}]."
    return f"Bad config value {path}={fault['input']!r:.80}: {message}."


def _beside(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """The keys that could stand at a place, also below a key that the user chose."""
    fields = annotation_of(model, loc[:-1])
    return [".".join(map(str, (*loc[:-1], name))) for name in getattr(fields, "model_fields", {})]


def meanings(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """The description of every setting, by its dotted key."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= meanings(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.description or ""
    return found


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key, sections included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += all_keys(field.annotation, f"{prefix}{name}.")
    return keys
