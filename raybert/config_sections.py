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
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `yes` and `on` are flags, and Python would take a flag for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            said = f"{info.field_name}={str(value).lower()} is a boolean, which is not allowed here"
            raise ValueError(f"{said} (YAML reads yes, no, on and off as booleans)")
        return value


class RunConfig(Section):
    """Where the run lives: its directory is ``storage/name``. Starting a run again under its name resumes it."""

    name: str = Field(
        default="bert",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run: letters, digits, dots, hyphens and underscores",
    )
    storage: AbsolutePath = Field(
        default="runs", validate_default=True, description="directory of all runs, a local path or any URI"
    )
    patience: float = Field(default=300, ge=0, description="seconds to keep retrying storage that fails")
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        default=["tensorboard"], description="experiment trackers to send the metrics to, besides metrics.jsonl"
    )


class DataConfig(Section):
    """What the run trains on."""

    shards: AbsolutePath = Field(default="", description="shard set written by `raybert prepare`, a path or any URI")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the sample order, the sentence pairs and the masks"
    )
    task_cpus: Cpus | Literal["auto"] = Field(default="auto", description="CPUs of one Ray Data task")
    verify: Literal["auto", "full", "sizes"] = Field(
        default="auto",
        description="check of the shards before training; auto: hashes up to 4 GB, only sizes beyond",
    )


# What a new run's weights begin with, beside the original's random ones; all but the last is part of the encoder.
ENCODER_INITS = ("embedding_init", "attention_init", "ffn_init", "output_init")
INITS = (*ENCODER_INITS, "mlm_init")
USUAL_INITS = ("random", "normal")


class ModelConfig(Section):
    """The encoder: a named size, or its dimensions. A dimension given next to a size replaces the size's own."""

    size: str | None = Field(default=None, description="named size: tiny, mini, compact, small or base")
    hidden_size: int | None = Field(default=None, gt=0, description="width of a token's vector; by default 384")
    num_hidden_layers: int | None = Field(default=None, gt=0, description="transformer layers; by default 6")
    num_attention_heads: int | None = Field(
        default=None, gt=0, description="attention heads of a layer, a divisor of hidden_size; by default 6"
    )
    intermediate_size: int | None = Field(
        default=None, gt=0, description="width of a feed-forward layer; by default 4 x hidden_size"
    )
    max_position_embeddings: int | None = Field(
        default=None, gt=0, description="longest sequence in tokens; by default 512"
    )
    vocab_size: int | None = Field(
        default=None, gt=0, description="size of the vocabulary; by default that of the shards"
    )
    type_vocab_size: int | None = Field(default=None, ge=2, description="number of segment types; by default 2")
    layer_norm_eps: float | None = Field(
        default=None, gt=0, description="added to the variance in each layer norm; by default 1e-12"
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="dropout of hidden states and attention; by default 0.1"
    )
    initializer_range: float | None = Field(
        default=None, gt=0, description="standard deviation of random initial weights; by default 0.02"
    )
    start_from: ModelPlace = Field(
        default="", description="checkpoint, transformers BERT directory or Hub name to start from; sets the dimensions"
    )
    embedding_init: Literal["random", "spectral", "whitened"] = Field(
        default="random",
        description="initial token embeddings; spectral: from co-occurrence counts of the shards; whitened: these, "
        "scaled to equal variance within texts",
    )
    attention_init: Literal["normal", "average"] = Field(
        default="normal", description="initial attention; average: each layer adds the mean over the tokens"
    )
    ffn_init: Literal["normal", "zero"] = Field(
        default="normal", description="initial feed-forward layers; zero: add nothing before the first step"
    )
    output_init: Literal["normal", "centred"] = Field(
        default="normal", description="initial scale of text vectors; centred: subtract the corpus mean, and scale down"
    )
    mlm_init: Literal["normal", "unigram"] = Field(
        default="normal", description="initial output layer for masked words; unigram: biases from token frequencies"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.start_from or self.size is not None:
            self.bert()  # what is given beside start_from is compared with what that has
        for key in INITS:
            if self.start_from and getattr(self, key) not in USUAL_INITS:
                raise ValueError(
                    f"model.start_from sets all weights, and model.{key}={getattr(self, key)} would replace some "
                    "of them; remove one of the two"
                )
        return self

    @property
    def needs_vectors(self) -> bool:
        """A new run begins with token vectors that are computed from its shards."""
        return self.embedding_init != "random"

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
    """How long the run trains, on how many workers, and how it recovers."""

    steps: int = Field(default=10_000, gt=0, description="optimizer steps of the whole run")
    global_batch: int = Field(default=256, gt=0, description="samples of one optimizer step, over all workers")
    micro_batch: int = Field(default=32, gt=0, description="samples of one forward pass of one worker")
    workers: int | tuple[int, int] = Field(default=1, description="N, or [min, max] for an elastic run")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the initial weights and of dropout")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="type of the matrix products; auto: bfloat16 where the hardware has it and it is faster",
    )
    compile: Literal["auto"] | bool = Field(default="auto", description="torch.compile; auto: on GPUs only")
    packing: Literal["auto"] | bool = Field(
        default="auto",
        description="pack the texts of a step without padding, in a few fixed shapes; auto: on GPUs that "
        "have a kernel for it",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute each layer in the backward pass: less memory, more time"
    )
    gradient_exchange: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the gradients sent between workers; bfloat16 halves the traffic"
    )
    worker_cpus: Cpus | Literal["auto"] = Field(
        default="auto", description="CPUs of one worker; auto: divided between workers, data tasks and a probe"
    )
    use_gpu: Literal["auto"] | bool = Field(
        default="auto", description="one GPU for each worker; auto: if the cluster has, or can add, enough"
    )
    grad_clip: float = Field(default=1.0, gt=0, description="clip the gradient to this norm")
    max_failures: int = Field(
        default=10, ge=0, description="give up after this many failures in a row without a new checkpoint"
    )
    max_bad_steps: int = Field(
        default=10,
        ge=1,
        description="give up after this many steps in a row with a NaN or infinite gradient, whose updates are skipped",
    )
    hang_factor: float = Field(
        default=30, gt=1, description="kill a rank after this many median step times without progress"
    )
    hang_seconds: float = Field(default=120, gt=0, description="minimum seconds before a rank counts as hung")
    resize_seconds: float = Field(
        default=60, gt=0, description="elastic runs: seconds between checks for added or lost nodes"
    )

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
        description="second objective besides masked words; contrastive: match the two halves of each window within "
        "the micro-batch; none: masked words only",
    )
    mlm_rate: float = Field(default=0.15, gt=0, le=0.9, description="fraction of the tokens to predict")
    mlm_rate_end: float | None = Field(
        default=None, gt=0, le=0.9, description="the fraction at the last step, approached linearly; not set: no change"
    )
    whole_word: bool = Field(default=False, description="mask all tokens of a word, or none")
    mlm_weight: float = Field(default=1.0, gt=0, description="weight of the masked-word loss")
    pair_weight: float = Field(default=1.0, gt=0, description="weight of the next-sentence or contrastive loss")
    vectors: Literal["pooler", "mean", "both"] = Field(
        default="both", description="text vectors that the contrastive and bag losses train"
    )
    temperature: float = Field(default=0.05, ge=0.01, description="divisor of the cosines in the contrastive loss")
    bag_weight: float = Field(
        default=0.0, ge=0, description="weight of the bag loss: a text's vector predicts its words; 0: off"
    )
    bag_tokens: int = Field(default=16, gt=0, le=256, description="words of each text that the bag loss predicts")
    bag_of: Literal["own", "neighbour"] = Field(
        default="own", description="whose words the bag loss predicts; neighbour: the other half's, if contrastive"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bag_weight and self.bag_of == "neighbour" and self.pair != "contrastive":
            raise ValueError(f"objective.bag_of=neighbour needs objective.pair=contrastive, not {self.pair}")
        contrast, bag = self.pair == "contrastive", self.bag_weight > 0
        used = {"pair_weight": self.pair != "none", "temperature": contrast, "vectors": contrast or bag}
        used |= {"bag_tokens": bag, "bag_of": bag}
        for key, is_used in used.items():
            if not is_used and getattr(self, key) != (default := type(self).model_fields[key].default):
                raise ValueError(
                    f"objective.{key}={getattr(self, key)} has no effect with objective.pair={self.pair} and "
                    f"objective.bag_weight={self.bag_weight:g}; leave it out or set its default, {default}"
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
    """AdamW."""

    lr: float = Field(default=6e-4, gt=0, description="peak learning rate")
    embedding_lr_ratio: float = Field(
        default=1.0, ge=0, le=1, description="learning rate of the token embeddings, as a fraction of the others'"
    )
    weight_decay: float = Field(default=0.01, ge=0, description="weight decay of matrices; none on biases and norms")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the running mean of gradients")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the running mean of squared gradients")
    eps: float = Field(default=1e-6, gt=0, description="added to the denominator of an update")


class ScheduleConfig(Section):
    """The learning rate over the run: a linear warm-up, then a decay."""

    warmup_steps: int | float = Field(
        default=100, ge=0, description="steps until the peak rate; below 1, a fraction of train.steps"
    )
    decay: Literal["linear", "cosine", "wsd", "constant"] = Field(
        default="linear", description="decay after the warm-up; wsd: stay at the peak, decay at the end"
    )
    decay_fraction: float = Field(
        default=0.2, gt=0, le=1, description="wsd: fraction of the run, at its end, that decays"
    )
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="final learning rate as a fraction of the peak")

    @field_validator("warmup_steps")
    @classmethod
    def _steps_or_fraction(cls, value: int | float) -> int | float:
        if 0 < value < 1:
            return value
        if value != int(value):
            raise ValueError(f"schedule.warmup_steps={value} must be an integer number of steps or a fraction below 1")
        return int(value)


class EveryConfig(Section):
    """How often things happen, in steps; 0 is never."""

    log: int = Field(default=10, gt=0, description="steps between lines of metrics.jsonl")
    validation: int = Field(default=500, ge=0, description="steps between validations")
    probe: int = Field(default=200, ge=0, description="steps between probes")
    checkpoint: int = Field(default=500, ge=0, description="steps between checkpoints")


class CheckpointConfig(Section):
    """Which checkpoints are kept."""

    keep_last: int = Field(default=2, ge=1, description="checkpoints to keep, the newest ones")
    keep_best: bool = Field(default=True, description="keep the best weights as well, in checkpoints/best")
    best: str = Field(
        default=VALIDATION_LOSS,
        description="how to choose the best weights: validation_loss, or a probe's headline (sts.spearman, "
        "sts.mean.spearman)",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.best != VALIDATION_LOSS and not self.keep_best:
            raise ValueError(
                f"checkpoint.best={self.best} has no effect with checkpoint.keep_best=false; set "
                "checkpoint.keep_best=true, or remove checkpoint.best"
            )
        return self


class ValidationConfig(Section):
    """What is scored at each validation."""

    samples: int = Field(default=1024, gt=0, description="validation samples to score, the same ones each time")


class ProbeConfig(Section):
    """The probes that run beside the training."""

    tasks: list[TaskSpec] | None = Field(
        default=None,
        description="names or YAML files of probe tasks; neighbours uses the run's own shards; [] for none; not set: "
        "the suite's tasks, else neighbours if the shards have enough text",
    )
    suite: TaskSpec = Field(
        default="", description="name or YAML file of a suite, whose tasks are added to probe.tasks"
    )
    cpus: Cpus | Literal["auto"] = Field(default="auto", description="CPUs of one probe")
    gpus: float = Field(default=0.0, ge=0.0, le=1.0, description="GPUs of one probe; may be a fraction")
    workers: int = Field(default=1, ge=1, description="parallel processes for the seeds of a fine-tuning probe")
    max_waiting: int = Field(
        default=20,
        ge=1,
        description="maximum number of checkpoints of a run that wait for a probe; older ones are skipped",
    )

    @property
    def named(self) -> bool:
        """Whether the settings name what to probe, if only that it is nothing."""
        return self.tasks is not None or bool(self.suite)


def warmup_steps(given: float, steps: int) -> int:
    """What `schedule.warmup_steps` means in a run of so many steps: a number of them, or below 1 a fraction."""
    return round(given * steps) if given < 1 else int(given)
