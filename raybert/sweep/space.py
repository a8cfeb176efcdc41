"""What a sweep varies: a YAML file becomes a list of trials, each a full configuration, before the first one starts."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from raybert import storage
from raybert.config import AbsolutePath, Config, Section, all_keys, explain, from_mapping
from raybert.config_sections import VALIDATION_LOSS
from raybert.config_text import annotation_of, look_up, read_overridden, set_key, typed
from raybert.errors import InputError


class Dimension(Section):
    """The values of one setting: a grid, or draws from a log-uniform range."""

    grid: list[Any] | None = Field(default=None, min_length=1, description="list of values")
    log_uniform: tuple[float, float] | None = Field(default=None, description="[low, high] of a log-uniform range")
    draws: int = Field(default=4, ge=1, description="number of values to draw from the range")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.grid is None) == (self.log_uniform is None):
            raise ValueError("give either grid or log_uniform")
        if self.log_uniform and not 0 < self.log_uniform[0] < self.log_uniform[1]:
            raise ValueError(f"log_uniform needs 0 < low < high, not {list(self.log_uniform)}")
        return self

    def values(self, seed: int, key: str) -> list[Any]:
        """The values in order; draws depend on the sweep's seed and the key alone."""
        if self.grid is not None:
            return self.grid
        assert self.log_uniform is not None
        low, high = map(math.log, self.log_uniform)
        rng = np.random.default_rng([seed, *key.encode()])
        # One draw from each of `draws` equal parts of the range: as random, and better spread.
        places = (np.arange(self.draws) + rng.random(self.draws)) / self.draws
        return [float(f"{math.exp(low + place * (high - low)):.4g}") for place in places]


class AshaConfig(Section):
    """Asynchronous successive halving (https://arxiv.org/abs/1810.05934) on the sweep's metric at equal tokens."""

    enabled: bool = Field(default=True, description="stop worse trials early; false: train all of them to the end")
    grace_fraction: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="fraction of the tokens that every trial trains on before it may be stopped",
    )
    reduction_factor: float = Field(
        default=2.0, gt=1, description="at each rung the best 1 / factor of the trials continue"
    )


class SweepConfig(Section):
    """`base` holds settings of `raybert pretrain`; `space` maps dotted keys to the values to try."""

    name: str = Field(
        default="sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the sweep's directory"
    )
    storage: AbsolutePath = Field(
        default="runs", validate_default=True, description="parent directory of the sweep's directory, at any URI"
    )
    base: dict[str, Any] = Field(
        default_factory=dict, description="settings that all trials share, as in a file for pretrain"
    )
    space: dict[str, Dimension] = Field(
        min_length=1, description="dotted keys of the settings to vary, and their values"
    )
    seed: int = Field(default=0, ge=0, description="seed of the draws")
    max_concurrent: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="trials to run at the same time; by default as many as fit"
    )
    metric: str = Field(
        default=VALIDATION_LOSS,
        description="figure that stops trials early and chooses the best: validation_loss, or a probe's headline "
        "(sts.spearman, sts.mean.spearman)",
    )
    asha: AshaConfig = AshaConfig()

    @property
    def uri(self) -> str:
        return storage.join(self.storage, self.name)


@dataclass(frozen=True)
class Trial:
    """One point of the space. Its run directory is SWEEP/trials/NAME."""

    name: str
    point: Mapping[str, Any]
    config: Config


def load(path: str, overrides: Iterable[str] = ()) -> SweepConfig:
    """Read a sweep's YAML file and apply overrides (``base.train.steps=100``, ``space.optimizer.lr.draws=3``).

    Raises:
        InputError: the file is missing, a key is unknown or a value is invalid.
    """
    if not storage.exists(path):
        raise InputError(f"There is no sweep file {path}.")
    try:
        return SweepConfig.model_validate(_typed(read_overridden(path, overrides, _place)))
    except ValidationError as error:
        raise explain(error, SweepConfig) from error


def _place(key: str) -> list[str]:
    """The path of an override's key. Those of the space have dots: ``space.optimizer.lr.draws`` is three parts."""
    section, _, rest = key.partition(".")
    if section != "space" or not rest:
        return key.split(".")
    known = (setting for setting in all_keys(Config) if "." in setting and f"{rest}.".startswith(f"{setting}."))
    setting = next(known, rest.rpartition(".")[0] or rest)
    field = rest.removeprefix(setting).removeprefix(".")
    return [section, setting, field] if field else [section, setting]


def _typed(tree: dict[str, Any]) -> dict[str, Any]:
    """What was read, as the sweep's own keys ask for, and the values of settings as theirs."""
    tree = typed(tree, SweepConfig)
    if "base" in tree:
        tree["base"] = typed(tree["base"], Config)
    space = tree.get("space")
    for key, values in space.items() if isinstance(space, dict) else ():
        if isinstance(grid := look_up(values, "grid"), list):
            setting = annotation_of(Config, str(key).split("."))
            values["grid"] = [typed(value, setting) for value in grid]
    return tree


def trials(sweep: SweepConfig) -> list[Trial]:
    """Every combination of the space's values.

    Raises:
        InputError: a key of the space is none of the settings, a combination is invalid, or two are the same.
    """
    dimensions = [list(enumerate(d.values(sweep.seed, key))) for key, d in sweep.space.items()]
    found = []
    seen: dict[str, Sequence[tuple[int, Any]]] = {}
    for number, combination in enumerate(itertools.product(*dimensions)):
        name = f"trial-{number:04d}"
        point = {key: value for key, (_, value) in zip(sweep.space, combination, strict=True)}
        tree = dict(sweep.base)  # whose parts `set_key` copies
        for key, value in point.items():
            set_key(tree, key, value)
        set_key(tree, "run.name", name)
        set_key(tree, "run.storage", storage.join(sweep.uri, "trials"))
        config = from_mapping(tree)
        if not config.every.validation:
            raise InputError("A sweep compares validation losses: set base.every.validation to a number of steps.")
        same = seen.setdefault(config.model_dump_json(exclude={"run": {"name", "storage"}}), combination)
        if same is not combination:
            values = [
                f"{first} and {second} of space.{key}"
                for key, (one, first), (other, second) in zip(sweep.space, same, combination, strict=True)
                if one != other
            ]
            raise InputError(f"{', '.join(values)} give the same trial; remove one of them, or lower draws.")
        found.append(Trial(name, point, config))
    return found
