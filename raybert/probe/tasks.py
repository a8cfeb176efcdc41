"""Probe tasks are data: which texts, which labels, how many. A new task is a YAML file, not code.

A task is named in one of four ways:

    bbc_news            a packaged one: ag_news, bbc_news, sst2
    ag_news@URI         a packaged one whose files lie in the directory URI (train.parquet, ag_news_test.csv, ...)
    neighbours@SHARDS   spans of a shard set; a run's own shards are meant where it names neighbours alone
    path/or/uri.yaml    the user's own
"""

import difflib
import posixpath
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from pydantic import ValidationError

from raybert import storage
from raybert.config_text import read_overridden, typed
from raybert.data.text.held_out import digests
from raybert.data.text.inputs import is_hidden, sentence
from raybert.errors import InputError
from raybert.probe import kinds, tables
from raybert.probe.kind import ProbeTask
from raybert.probe.neighbours import NeighboursTask
from raybert.probe.texts import LabelledTask

_SPLIT_FILE = r"(?i)(?:{name}[-_.])?(?P<split>{splits})(?:-\d+-of-\d+)?\.(?:parquet|csv|jsonl)"


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
        task = parse_task(_with_absolute_paths(read_overridden(spec), spec), spec)
    elif name in names():
        task = packaged(name)
        if at and not folder:
            raise InputError(f"{spec} names no directory: write {name}@URI.")
        if at and isinstance(task, NeighboursTask):
            task = task.model_copy(update={"shards": storage.absolute(folder)})
        elif at:
            return _in_folder(task, storage.absolute(folder))
    else:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}" if near else f"the packaged ones are {', '.join(names())}"
        raise InputError(f"There is no probe task {spec}; {hint}, or give the path of a task's YAML file.")
    check_task(task)
    return task


def _with_absolute_paths(tree: dict[str, Any], spec: str) -> dict[str, Any]:
    """The task with its relative paths taken from the directory of its YAML file."""
    folder = storage.absolute(spec).rpartition("/")[0]
    files = {key: tree[key] for key in _model(tree, spec).URIS if isinstance(tree.get(key), str)}
    return tree | {key: storage.absolute(uri, folder) for key, uri in files.items()}


def packaged(name: str) -> ProbeTask:
    """A packaged task as it is written down; nothing is opened."""
    path = resources.files("raybert.probe") / "tasks" / f"{name}.yaml"
    return parse_task(read_overridden(str(path)), str(path))


def _model(tree: Mapping[str, Any], source: str) -> type[ProbeTask]:
    """The settings of the kind that the mapping names.

    Raises:
        InputError: there is no such kind.
    """
    kind = str(tree.get("kind", kinds.DEFAULT))
    if kind not in kinds.KINDS:
        near = difflib.get_close_matches(kind, kinds.KINDS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"The probe task {source} has the unknown kind {kind}; did you mean {near}? The kinds are "
            f"{', '.join(kinds.KINDS)}."
        )
    return kinds.KINDS[kind].settings


def parse_task(tree: Mapping[str, Any], source: str) -> ProbeTask:
    """Check a mapping; `source` is what the error calls it.

    Raises:
        InputError: one sentence for the first fault; an unknown key names the nearest real one, or its kind.
    """
    model = _model(tree, source)
    try:
        return model.model_validate(typed(tree, model))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("tuple", "str")))
        if fault["type"] == "extra_forbidden":
            raise InputError(_unknown(key, model, source)) from error
        if fault["type"] == "missing":
            raise InputError(f"The probe task {source} lacks the key {key}.") from error
        why = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "value_error" and not key:
            raise InputError(f"The probe task {source}: {why}.") from error
        raise InputError(f"Bad value {key}={fault['input']!r} in the probe task {source}: {why}.") from error


def _unknown(key: str, model: type[ProbeTask], source: str) -> str:
    others = [kind.name for kind in kinds.KINDS.values() if key in kind.settings.model_fields]
    if others:
        kind = next(kind.name for kind in kinds.KINDS.values() if kind.settings is model)
        return (
            f"The key {key} in the probe task {source} belongs to kind {' and '.join(others)}, but the task is of "
            f"kind {kind}; remove it, or set kind."
        )
    near = difflib.get_close_matches(key, list(model.model_fields), n=1, cutoff=0.0)[0]
    return f"Unknown key {key} in the probe task {source}. Did you mean {near}?"


def check_task(task: ProbeTask) -> None:
    """All that can be known of a task before anything is trained.

    Raises:
        InputError: as `Kind.check`.
    """
    kinds.of_task(task).check(task)


def held_out(tasks: Iterable[ProbeTask]) -> frozenset[int]:
    """Digests of the texts that the tasks judge by, which `prepare` then leaves out of what is trained on.

    Raises:
        InputError: the texts of a task cannot be read.
    """
    return digests(text for task in tasks for text in kinds.of_task(task).held_out(task))


def passed_over(task: ProbeTask) -> str:
    """A line for a person: which files at the task's URIs are not read, and why; empty where all are."""
    return sentence(
        [passed for uri in dict.fromkeys(uri for uri, _ in task.files) for passed in tables.passed_over(uri)]
    )


def _in_folder(task: ProbeTask, folder: str) -> ProbeTask:
    """The packaged task with its files found in a directory.

    Raises:
        InputError: there is no file for a split, or it lacks a column.
    """
    if not isinstance(task, LabelledTask) or task.test is None:
        raise InputError(f"The probe task {task.name} comes with a Python package; name it without @{folder}.")
    files = [file for file, below in storage.find_files(folder) if not is_hidden(below)]
    if not files:
        raise InputError(f"The directory {folder} of the probe task {task.name} does not exist or is empty.")
    held_out = ("validation", "dev", "test") if "validation" in task.test else ("test", "validation", "dev")
    train, test = _find_split(task.name, files, ("train",)), _find_split(task.name, files, held_out)
    if train is None or test is None:
        raise InputError(
            f"{folder} contains no {'training' if train is None else 'test'} file of the probe task {task.name}: "
            f"name it {task.name}_{'train' if train is None else held_out[0]}.parquet (found "
            f"{', '.join(posixpath.basename(file) for file in files[:5])})."
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
