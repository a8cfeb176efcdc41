"""Probe tasks are data: which texts, which labels, how many. A new task is a YAML file, not code.

A task is named in one of three ways:

    bbc_news            a packaged one: ag_news, bbc_news, sst2
    ag_news@URI         a packaged one whose files lie in the directory URI (train.parquet, ag_news_test.csv, ...)
    path/or/uri.yaml    the user's own
"""

import difflib
import hashlib
import json
import posixpath
import re
from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from raybert import storage
from raybert.config_text import read_overridden, typed
from raybert.data.text.inputs import is_hidden, sentence
from raybert.data.text.values import refuse_twins
from raybert.errors import InputError
from raybert.probe import tables

TASK_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_SPLIT_FILE = r"(?i)(?:{name}[-_.])?(?P<split>{splits})(?:-\d+-of-\d+)?\.(?:parquet|csv|jsonl)"


class ProbeTask(BaseModel):
    """Texts with classes, and how they are sampled. The first rows are taken, or random ones when a seed is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=TASK_NAME)]
    title: str = Field(default="", description="how people call it; the name when empty")
    train: str = Field(description="parquet, csv or jsonl: a file, directory or glob, at any URI or beside the YAML")
    test: str | None = Field(default=None, description="the same; without it, texts of `train` are held out")
    text: str | tuple[str, str] = Field(default="text", description="text column, or the two columns of a pair")
    label: str = "label"
    label_names: list[str] = Field(default_factory=list, description="names of integer labels 0, 1, ...")
    n_train: int | None = Field(default=None, gt=1, description="training rows to use; all when not set")
    n_test: int | None = Field(default=None, gt=0, description="test rows to use; all when not set")
    seed: int | None = Field(default=None, ge=0, description="draw rows at random; None: the first rows")
    max_tokens: int = Field(default=256, ge=8, description="texts are cut to this many tokens, specials included")

    @field_validator("train", "test")
    @classmethod
    def _absolute(cls, uri: str | None) -> str | None:
        """Ray's workers run in other directories than the command that names the file."""
        return uri if uri is None else storage.absolute(uri)

    @property
    def columns(self) -> list[str]:
        """The text column, or the two of a pair."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def hash(self) -> str:
        """Identity of the task as it is written down (not of the texts behind the URIs)."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def names() -> list[str]:
    """The packaged tasks."""
    folder = resources.files("raybert.probe") / "tasks"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_task(spec: str) -> ProbeTask:
    """The task that `spec` names (see above), with its files and columns known to exist.

    Raises:
        InputError: one sentence: no such task, a bad key or value, a file or a column that is missing, no network.
    """
    name, at, folder = spec.partition("@")
    if spec.endswith((".yaml", ".yml")):
        if not storage.exists(spec):
            raise InputError(f"There is no probe task file {spec}.")
        task = parse_task(_beside(read_overridden(spec), spec), spec)
    elif name in names():
        task = packaged(name)
        if at and not folder:
            raise InputError(f"{spec} names no directory: write {name}@URI.")
        if at:
            return _in_folder(task, storage.absolute(folder))
    else:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}" if near else f"the packaged ones are {', '.join(names())}"
        raise InputError(f"There is no probe task {spec}; {hint}, or give the path of a task's YAML file.")
    check_task(task)
    return task


def _beside(tree: dict[str, Any], spec: str) -> dict[str, Any]:
    """The task with its relative paths taken from the directory of its YAML file."""
    folder = storage.absolute(spec).rpartition("/")[0]
    files = {key: tree[key] for key in ("train", "test") if isinstance(tree.get(key), str)}
    return tree | {key: storage.absolute(uri, folder) for key, uri in files.items()}


def packaged(name: str) -> ProbeTask:
    """A packaged task as it is written down; nothing is opened."""
    path = resources.files("raybert.probe") / "tasks" / f"{name}.yaml"
    return parse_task(read_overridden(str(path)), str(path))


def parse_task(tree: Mapping[str, Any], source: str) -> ProbeTask:
    """Check a mapping; `source` is what the error calls it.

    Raises:
        InputError: one sentence for the first fault; an unknown key names the nearest real one.
    """
    try:
        return ProbeTask.model_validate(typed(tree, ProbeTask))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("tuple", "str")))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, list(ProbeTask.model_fields), n=1, cutoff=0.0)[0]
            raise InputError(f"Unknown key {key} in the probe task {source}. Did you mean {near}?") from error
        if fault["type"] == "missing":
            raise InputError(f"The probe task {source} lacks the key {key}.") from error
        raise InputError(f"Bad value {key}={fault['input']!r} in the probe task {source}: {fault['msg']}.") from error


def check_task(task: ProbeTask) -> None:
    """Look at the first file of each split.

    Raises:
        InputError: no file, a missing column, or no network for a data set on the Hub.
    """
    for uri in (task.train, task.test):
        if uri is None:
            continue
        try:
            found = tables.columns(uri)
        except Exception as error:  # of whatever client serves the URI
            if uri.startswith("hf://"):
                fault = type(error.__cause__ or error).__name__
                raise InputError(
                    f"The probe task {task.name} is read from the Hugging Face Hub, which needs a network and "
                    f"pip install 'raybert[hub]' ({fault}); or name it as {task.name}@URI, the directory with its "
                    "train and test parquet files, or give a task's YAML file."
                ) from error
            if isinstance(error, InputError):
                raise
            raise InputError(f"{uri} of the probe task {task.name} cannot be read: {error}.") from error
        missing = [column for column in (*task.columns, task.label) if column not in found]
        if missing:
            raise InputError(
                f"{uri} has no column {missing[0]} for the probe task {task.name}; it has {', '.join(found)}."
            )
        refuse_twins(uri, found, [*task.columns, task.label])


def passed_over(task: ProbeTask) -> str:
    """A line for a person: which files at the task's URIs are not read, and why; empty where all are."""
    return sentence(
        [passed for uri in dict.fromkeys((task.train, task.test)) if uri for passed in tables.passed_over(uri)]
    )


def _in_folder(task: ProbeTask, folder: str) -> ProbeTask:
    """The packaged task with its files found in a directory.

    Raises:
        InputError: there is no file for a split, or it lacks a column.
    """
    if task.test is None:
        raise InputError(f"The probe task {task.name} comes with a Python package; name it without @{folder}.")
    files = [file for file, below in storage.find_files(folder) if not is_hidden(below)]
    if not files:
        raise InputError(f"The directory {folder} of the probe task {task.name} does not exist or is empty.")
    held_out = ("validation", "dev", "test") if "validation" in task.test else ("test", "validation", "dev")
    train, test = _find_split(task.name, files, ("train",)), _find_split(task.name, files, held_out)
    if train is None or test is None:
        raise InputError(
            f"{folder} holds no {'training' if train is None else 'test'} file of the probe task {task.name}: "
            f"name it {task.name}_{'train' if train is None else held_out[0]}.parquet "
            f"(found {', '.join(posixpath.basename(file) for file in files[:5])})."
        )
    # Copies of a data set often call their text column "text" whatever its first publisher called it.
    text = task.text if set(task.columns) <= set(tables.columns(train)) else "text"
    found = task.model_copy(update={"train": train, "test": test, "text": text})
    check_task(found)
    return found


def _find_split(name: str, files: list[str], splits: tuple[str, ...]) -> str | None:
    for split in splits:
        pattern = re.compile(_SPLIT_FILE.format(name=re.escape(name), splits=split))
        shards = [file for file in files if pattern.fullmatch(posixpath.basename(file))]
        named = [file for file in shards if posixpath.basename(file).startswith(name)]
        if shards:
            # All parts of a data set that was cut in several.
            folder, _, first = (named or shards)[0].rpartition("/")
            return storage.join(folder, re.sub(r"-\d+-of-", "-*-of-", first))
    return None
