"""The sections of a run's settings, each with its keys, their types and what must fit within it."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from raybert import storage
from raybert.model.config import BertConfig
from raybert.model.objective import Objective
from raybert.model.sizes import SIZES
from raybert.storage import hub


def _absolute_task(spec: str) -> str:
    """A probe task's name as it is; the directory or the YAML file that it names under its absolute path."""
    name, at, folder = spec.partition("@")
    if spec.endswith((".yaml", ".yml")):
        return storage.absolute(spec)
    return f"{name}@{storage.absolute(folder)}" if at and folder else spec


def _absolute_model(where: str) -> str:
    """A model's name on the Hub as it is; a place under its absolute path."""
    return storage.absolute(where) if where and not hub.is_name(where) else where


# Workers and trials run in other directories than the command that names a path.
AbsolutePath = Annotated[str, AfterValidator(lambda path: storage.absolute(path) if path else path)]
VALIDATION_LOSS = "validation_loss"
NEIGHBOURS = "neighbours"  # the probe task that needs nothing but shards
Cpus = Annotated[float, Field(gt=0)]
ModelPlace = Annotated[str, AfterValidator(_absolute_model)]
TaskSpec = Annotated[str, AfterValidator(_absolute_task)]


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


# What a new run's weights begin with, beside the original's random ones; all but the last is part of the encoder.
ENCODER_INITS = ("embedding_init", "attention_init", "output_init")
INITS = (*ENCODER_INITS, "mlm_init")
USUAL_INITS = ("random", "normal")


class ModelConfig(Section):
    """A named size, or the dimensions themselves; a dimension given beside a size replaces the size's own."""

    size: str | None = None
    hidden_size: int | None = Field(default=None, gt=0)
    num_hidden_layers: int | None = Field(default=None, gt=0)
    num_attention_heads: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    max_position_embeddings: int | None = Field(default=None, gt=0)
    vocab_size: int | None = Field(default=None, gt=0, description="by default that of the shards' tokenizer")
    type_vocab_size: int | None = Field(default=None, ge=2)
    layer_norm_eps: float | None = Field(default=None, gt=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    initializer_range: float | None = Field(default=None, gt=0)
    start_from: ModelPlace = Field(
        default="",
        description="checkpoint, transformers BERT directory or Hub name whose weights a new run begins with; its "
        "dimensions are the run's",
    )
    embedding_init: Literal["random", "spectral"] = Field(
        default="random", description="token embeddings of a new run; spectral: from co-occurrence in the shards"
    )
    attention_init: Literal["normal", "average"] = Field(
        default="normal", description="attention of a new run; average: each layer adds the mean over the tokens"
    )
    output_init: Literal["normal", "centred"] = Field(
        default="normal", description="scale of a new run's vectors; centred: what all texts share is taken out"
    )
    mlm_init: Literal["normal", "unigram"] = Field(
        default="normal",
        description="output layer of masked words of a new run; unigram: it knows how frequent each is",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.start_from or self.size is not None:
            self.bert()  # what is given beside start_from is compared with what that has
        for key in INITS:
            if self.start_from and getattr(self, key) not in USUAL_INITS:
                raise ValueError(
                    f"model.start_from brings all weights, and model.{key}={getattr(self, key)} would replace some of "
                    f"them; leave one of the two out"
                )
        return self

    @property
    def begins_random(self) -> bool:
        """A new run's weights are drawn as those of any untrained encoder."""
        return not self.start_from and all(getattr(self, key) in USUAL_INITS for key in ENCODER_INITS)

    def given(self) -> dict[str, Any]:
        """The dimensions that the settings state, by a size or themselves."""
        dimensions = dict(SIZES[self.size]) if self.size else {}
        start = {"size", "start_from", *INITS}
        return dimensions | {k: v for k, v in self.model_dump(exclude=start).items() if v is not None}

    def bert(self) -> BertConfig:
        """The encoder's own configuration, in a run whose settings are complete (`raybert.train.complete`).

        Raises:
            ValueError: the size is unknown, or the heads do not divide the hidden size.
        """
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown model.size {self.size!r}: use one of {', '.join(SIZES)}")
        return BertConfig(**self.given())


class TrainConfig(Section):
    steps: int = Field(default=10_000, gt=0)
    global_batch: int = Field(default=256, gt=0, description="samples of one optimizer step, over all workers")
    micro_batch: int = Field(default=32, gt=0, description="samples of one forward pass of one worker")
    workers: int | tuple[int, int] = Field(default=1, description="N, or [min, max] for an elastic run")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the initial weights and of dropout")
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: Literal["auto"] | bool = Field(default="auto", description="torch.compile; auto: on GPUs only")
    packing: Literal["auto"] | bool = Field(
        default="auto",
        description="join micro-batches and pack their texts without padding, in a few fixed shapes; auto: on GPUs "
        "that have a kernel for it",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute each layer twice instead of keeping what it computed: less memory"
    )
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


class ObjectiveConfig(Section):
    """What the encoder is trained to do; by default the original's masked words and next sentences."""

    pair: Literal["next_sentence", "contrastive", "none"] = Field(
        default="next_sentence",
        description="contrastive: both halves of a window are sequences of their own, and each finds its other half "
        "among those of its micro-batch",
    )
    mlm_rate: float = Field(default=0.15, gt=0, le=0.9, description="fraction of the tokens to predict")
    mlm_rate_end: float | None = Field(
        default=None, gt=0, le=0.9, description="fraction at the last step, reached in a straight line; none: no change"
    )
    whole_word: bool = Field(default=False, description="predict all tokens of a word, or none")
    mlm_weight: float = Field(default=1.0, gt=0)
    pair_weight: float = Field(default=1.0, gt=0)
    vectors: Literal["pooler", "mean", "both"] = Field(default="both", description="of a text, for contrast and bag")
    temperature: float = Field(default=0.05, ge=0.01, description="of the contrast")
    bag_weight: float = Field(default=0.0, ge=0, description="of the words that a text's vector predicts; 0: none")
    bag_tokens: int = Field(default=16, gt=0, le=256, description="of these words, for each text")
    bag_of: Literal["own", "neighbour"] = Field(
        default="own", description="whose words; neighbour: of the window's other half, with pair=contrastive"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bag_weight and self.bag_of == "neighbour" and self.pair != "contrastive":
            raise ValueError(
                f"objective.bag_of=neighbour needs the two halves of objective.pair=contrastive, not {self.pair}"
            )
        contrast, bag = self.pair == "contrastive", self.bag_weight > 0
        used = {"pair_weight": self.pair != "none", "temperature": contrast, "vectors": contrast or bag}
        used |= {"bag_tokens": bag, "bag_of": bag}
        for key, is_used in used.items():
            if not is_used and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"objective.{key}={getattr(self, key)} does nothing with objective.pair={self.pair} and "
                    f"objective.bag_weight={self.bag_weight:g}; leave it out"
                )
        return self

    def objective(self) -> Objective:
        """The losses and their weights, as the model knows them."""
        return Objective(
            pair=self.pair,
            mlm_weight=self.mlm_weight,
            pair_weight=self.pair_weight,
            bag_weight=self.bag_weight,
            vectors=self.vectors,
            temperature=self.temperature,
        )


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
    keep_best: bool = Field(default=True, description="keep the best weights as well, in checkpoints/best")
    best: str = Field(
        default=VALIDATION_LOSS,
        description="what they are best by: validation_loss, or a probe's headline (sts.spearman, sts.mean.spearman)",
    )


class ValidationConfig(Section):
    samples: int = Field(default=1024, gt=0, description="validation samples scored each time, the same ones always")


class ProbeConfig(Section):
    tasks: list[TaskSpec] | None = Field(
        default=None,
        description="names or YAML files of probe tasks; neighbours is of the run's own shards; [] for none. Not set: "
        "the suite's, or else neighbours, if the shards have text for it",
    )
    suite: TaskSpec = Field(default="", description="name or YAML file of a suite, whose tasks are probed as well")
    cpus: Cpus | Literal["auto"] = Field(default="auto", description="CPUs of one probe")
    gpus: float = Field(default=0.0, ge=0.0, le=1.0, description="GPUs of one probe; a share of one is enough")
    workers: int = Field(default=1, ge=1, description="processes at a time, for the seeds of fine-tuning")
    max_waiting: int = Field(default=20, ge=1, description="checkpoints of one run that may wait; older are skipped")

    @property
    def named(self) -> bool:
        """Whether the settings name what to probe, if only that it is nothing."""
        return self.tasks is not None or bool(self.suite)


def warmup_steps(given: float, steps: int) -> int:
    """What `schedule.warmup_steps` means in a run of so many steps: a number of them, or below 1 a fraction."""
    return round(given * steps) if given < 1 else int(given)
