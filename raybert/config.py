"""Every setting of a run, typed. YAML files and dotted ``key.sub=value`` overrides become one checked ``Config``."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raybert import storage
from raybert.config_text import annotation_of, dump, read_overridden, set_dotted, set_key, typed
from raybert.config_text import look_up as look_up  # for those who read a run's settings
from raybert.config_text import read_yaml_mapping as read_yaml_mapping
from raybert.errors import InputError
from raybert.model.config import BertConfig
from raybert.model.sizes import SIZES


def _absolute_task(spec: str) -> str:
    """A probe task's name as it is; the directory or the YAML file that it names under its absolute path."""
    name, at, folder = spec.partition("@")
    if spec.endswith((".yaml", ".yml")):
        return storage.absolute(spec)
    return f"{name}@{storage.absolute(folder)}" if at and folder else spec


# Workers and trials run in other directories than the command that names a path.
AbsolutePath = Annotated[str, AfterValidator(lambda path: storage.absolute(path) if path else path)]
Cpus = Annotated[float, Field(gt=0)]
TaskSpec = Annotated[str, AfterValidator(_absolute_task)]


# What a union adds to the place of a fault, which is no part of a key: train.workers.int.
_UNION_PART = re.compile(r"function-.*|constrained-.*|int|float|str|bool|(list|tuple|literal)\[.*")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `yes` and `on` are flags, and Python would take a flag for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"{info.field_name} is {str(value).lower()} and must not be a flag")
        return value


class RunConfig(Section):
    """Where the run lives: its directory is ``storage/name``. A run that is started again under its name goes on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "bert"
    storage: AbsolutePath = Field(default="runs", validate_default=True)
    patience: float = Field(default=300, ge=0, description="seconds that storage may fail before a worker gives up")
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        default=["tensorboard"], description="where figures go beside metrics.jsonl"
    )


class DataConfig(Section):
    shards: AbsolutePath = Field(default="", description="URI of a shard set that `raybert prepare` wrote")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the sample order, the pairs and the masks")
    task_cpus: Cpus | Literal["auto"] = Field(default="auto", description="CPUs of one Ray Data task")
    verify: Literal["auto", "full", "sizes"] = Field(
        default="auto", description="check of the shards before training; auto: every hash up to 4 GB, then sizes"
    )


class ModelConfig(Section):
    """A named size, or the dimensions themselves; a dimension given beside a size replaces the size's own."""

    size: str | None = None
    hidden_size: int | None = Field(default=None, gt=0)
    num_hidden_layers: int | None = Field(default=None, gt=0)
    num_attention_heads: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    max_position_embeddings: int | None = Field(default=None, gt=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    initializer_range: float | None = Field(default=None, gt=0)
    start_from: AbsolutePath = Field(
        default="", description="checkpoint whose weights a new run begins with, of the same dimensions"
    )

    embedding_init: Literal["random", "spectral"] = Field(
        default="random", description="token embeddings of a new run; spectral: from co-occurrence in the shards"
    )
    attention_init: Literal["normal", "average"] = Field(
        default="normal", description="attention of a new run; average: each layer adds the mean over the tokens"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.bert()
        for key, usual in (("embedding_init", "random"), ("attention_init", "normal")):
            if self.start_from and getattr(self, key) != usual:
                raise ValueError(
                    f"model.start_from brings all weights, and model.{key}={getattr(self, key)} would replace some of "
                    f"them; leave one of the two out"
                )
        return self

    @property
    def begins_random(self) -> bool:
        """A new run's weights are drawn as those of any untrained encoder."""
        return not self.start_from and self.embedding_init == "random" and self.attention_init == "normal"

    def bert(self) -> BertConfig:
        """The encoder's own configuration.

        Raises:
            ValueError: the size is unknown, or the heads do not divide the hidden size.
        """
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown model.size {self.size!r}: use one of {', '.join(SIZES)}")
        dimensions = dict(SIZES[self.size]) if self.size else {}
        start = {"size", "start_from", "embedding_init", "attention_init"}
        dimensions |= {k: v for k, v in self.model_dump(exclude=start).items() if v is not None}
        return BertConfig(**dimensions)


class TrainConfig(Section):
    steps: int = Field(default=10_000, gt=0)
    global_batch: int = Field(default=256, gt=0, description="samples of one optimizer step, over all workers")
    micro_batch: int = Field(default=32, gt=0, description="samples of one forward pass of one worker")
    workers: int | tuple[int, int] = Field(default=1, description="N, or [min, max] for an elastic run")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the initial weights and of dropout")
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: Literal["auto"] | bool = Field(default="auto", description="torch.compile; auto: on GPUs only")
    gradient_exchange: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type in which gradients travel between workers; bfloat16 halves the bytes"
    )
    worker_cpus: Cpus | Literal["auto"] = "auto"
    use_gpu: Literal["auto"] | bool = "auto"
    grad_clip: float = Field(default=1.0, gt=0)
    max_failures: int = Field(
        default=10, ge=0, description="failures to recover from, without a new checkpoint between, before giving up"
    )
    max_bad_steps: int = Field(
        default=10, ge=1, description="steps in a row whose gradient is not finite, and whose update is left out"
    )
    hang_factor: float = Field(
        default=30, gt=1, description="a rank without progress for so many usual steps hangs, and is ended"
    )
    hang_seconds: float = Field(default=120, gt=0, description="no rank hangs before so many seconds")
    resize_seconds: float = Field(default=60, gt=0, description="elastic: how often to look for more or fewer nodes")

    @model_validator(mode="after")
    def _check(self) -> Self:
        lo, hi = self.worker_range
        if not 1 <= lo <= hi:
            raise ValueError(f"train.workers must be N >= 1 or [min, max] with 1 <= min <= max, not {self.workers}")
        if lo not in self.worker_counts:
            raise ValueError(
                f"train.global_batch={self.global_batch} cannot be divided into micro-batches of "
                f"{self.micro_batch} over {lo} workers; make it a multiple of {self.micro_batch * lo}"
            )
        return self

    @property
    def worker_counts(self) -> list[int]:
        """The numbers of workers that the run may have: those in its range that divide the global batch."""
        lo, hi = self.worker_range
        return [n for n in range(lo, hi + 1) if self.global_batch % (self.micro_batch * n) == 0]

    @property
    def worker_range(self) -> tuple[int, int]:
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)


class OptimizerConfig(Section):
    lr: float = Field(default=6e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=0.01, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-6, gt=0)


class ScheduleConfig(Section):
    warmup_steps: int | float = Field(
        default=100, ge=0, description="steps until the peak rate; below 1, a fraction of train.steps"
    )
    decay: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="wsd: last part of the run that decays")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="lr at the last step / peak lr")

    @field_validator("warmup_steps")
    @classmethod
    def _steps_or_fraction(cls, value: int | float) -> int | float:
        if 0 < value < 1:
            return value
        if value != int(value):
            raise ValueError(
                f"schedule.warmup_steps={value} is neither a whole number of steps nor a fraction of them below 1"
            )
        return int(value)


class EveryConfig(Section):
    """Cadences in steps; 0 = never."""

    log: int = Field(default=10, gt=0)
    validation: int = Field(default=500, ge=0)
    probe: int = Field(default=200, ge=0)
    checkpoint: int = Field(default=500, ge=0)


class CheckpointConfig(Section):
    keep_last: int = Field(default=2, ge=1)
    keep_best: bool = Field(default=True, description="keep the checkpoint of the lowest validation loss as well")


class ValidationConfig(Section):
    samples: int = Field(default=1024, gt=0, description="validation samples scored each time, the same ones always")


class ProbeConfig(Section):
    tasks: list[TaskSpec] = Field(default_factory=list, description="names or YAML files of probe tasks")
    cpus: Cpus | Literal["auto"] = Field(default="auto", description="CPUs of one probe")
    gpus: float = Field(default=0.0, ge=0.0, le=1.0, description="GPUs of one probe; a share of one is enough")
    max_waiting: int = Field(default=20, ge=1, description="checkpoints of one run that may wait; older are skipped")


class Config(Section):
    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig(size="compact")
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    every: EveryConfig = EveryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    probe: ProbeConfig = ProbeConfig()

    @property
    def run_uri(self) -> str:
        return storage.join(self.run.storage, self.run.name)

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, also where it is given as a fraction of the run."""
        return warmup_steps(self.schedule.warmup_steps, self.train.steps)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule.warmup_steps > self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is more than train.steps={self.train.steps}; "
                "lower it, or give a fraction of the steps, such as 0.05"
            )
        return self

    def to_yaml(self) -> str:
        return dump(self.model_dump(mode="json"))


def warmup_steps(given: float, steps: int) -> int:
    """What `schedule.warmup_steps` means in a run of so many steps: a number of them, or below 1 a fraction."""
    return round(given * steps) if given < 1 else int(given)


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
        InputError: it is no run directory.
    """
    run_uri = storage.absolute(uri)
    if not storage.exists(storage.join(run_uri, "config.yaml")):
        raise InputError(f"{uri} is not a run directory: it has no config.yaml. Give the storage/name of a run.")
    return run_uri


def load_run(run_uri: str, overrides: Iterable[str] = ()) -> Config:
    """The settings that a run was started with, wherever its directory lies now.

    Raises:
        InputError: it is no run directory, or an override does not fit.
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
        raise InputError(f"A config is a mapping of sections, not {tree!r:.60}.")
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


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key, sections included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += all_keys(field.annotation, f"{prefix}{name}.")
    return keys
