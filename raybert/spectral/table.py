"""The table of a shard set, made once: Ray tasks read and count, one factorises and writes, and later runs find it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from raybert import storage
from raybert.config import Config
from raybert.console import errors
from raybert.data.shards import ShardSet, read_unit
from raybert.data.units import Unit
from raybert.errors import InputError, RunFailed, last_line
from raybert.spectral import count, factorise, files
from raybert.spectral.recipe import REMEDY, Recipe, too_few
from raybert.tokenizer import Vocabulary

PARTS = 8  # tasks that read, and tasks that count; how many leaves no trace in the result
MOST_THREADS = 4
FACTORS_PRIORITY = 10


def for_run(config: Config, shards: ShardSet, *, cpus: float, show: bool = False, shared: bool = False) -> str:
    """URI of the token vectors that a run begins with, made if there are none yet; empty when it needs none.

    Args:
        cpus, show: as in `ensure`.
        shared: with all runs of its `run.storage`, where the vectors go when the shards' own place cannot be written.

    Raises:
        InputError, RunFailed: as `ensure`, or the vectors are too short for the model.
    """
    if config.model.embedding_init == "random":
        return ""
    places = [config.run.storage] if shared else places_of(config)
    uri = ensure(shards, Recipe(config.data.seed), *places, cpus=cpus, show=show)
    found, size = files.shape(uri), config.model.bert().hidden_size
    if found is not None and found[0] < size:
        raise too_few(shards.uri, found[0], size)
    return uri


def places_of(config: Config) -> list[str]:
    """Where a run's table may lie besides its shards: in its own directory, and that of a sweep above its trials."""
    return [config.run_uri, config.run.storage]


def find(shards: ShardSet, recipe: Recipe, *places: str) -> str:
    """Where the table lies: beside the shards or in one of the directories `places`; empty where there is none yet."""
    uris = (storage.join(place, recipe.file_name(shards)) for place in (shards.uri, *places))
    return next((uri for uri in uris if files.shape(uri) is not None), "")


def ensure(
    shards: ShardSet,
    recipe: Recipe,
    place: str,
    *others: str,
    cpus: float = 1.0,
    parts: int = PARTS,
    show: bool = False,
) -> str:
    """The table's URI; it is made where there is none. Ray must be connected.

    Whoever makes the same table at the same time makes the same bytes, and a file appears whole.

    Args:
        place: directory where it goes when the shards' own cannot be written.
        others: directories where it may lie as well.
        cpus: of each task.
        parts: tasks among which the reading and the counting are divided.
        show: a bar on standard error.

    Raises:
        InputError: a shard is damaged, or no place can be written.
        RunFailed: a task failed, and so did its retries.
    """
    if found := find(shards, recipe, place, *others):
        return found
    try:
        with _bar(show) as bar:
            return _make(shards, recipe, place, cpus, parts, bar)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from error
        raise RunFailed(_failed(f"{type(error.cause).__name__}: {error.cause}")) from error
    except RayError as error:
        raise RunFailed(_failed(last_line(error))) from error


def _failed(reason: str) -> str:
    return f"Computing the token vectors failed ({reason}); rerun the command, or {REMEDY}."


def _make(shards: ShardSet, recipe: Recipe, place: str, cpus: float, parts: int, bar: Progress) -> str:
    units = recipe.sample(shards)
    shares = [list(share) for share in np.array_split(np.array(units, object), min(parts, len(units)))]
    read = [_read.options(num_cpus=cpus).remote(shards.uri, share, recipe.reach, shards.vocabulary) for share in shares]
    _wait([found for _, found in read], bar, bar.add_task("reading", total=len(read)))
    frequency = np.sum(ray.get([found for _, found in read]), axis=0)
    chosen = count.pick_columns(frequency, recipe.columns)
    streams = [stream for stream, _ in read]
    counted = [
        _count.options(num_cpus=cpus).remote(streams, chosen, first, stop, recipe.reach)
        for first, stop in count.share_rows(frequency, parts)
    ]
    _wait(counted, bar, bar.add_task("counting pairs", total=len(counted)))
    del read, streams
    uris = [storage.join(directory, recipe.file_name(shards)) for directory in (shards.uri, place)]
    made = _factorise.options(num_cpus=cpus).remote(counted, len(chosen), recipe, uris)
    _wait([made], bar, bar.add_task("factorising", total=None))
    uri: str = ray.get(made)
    return uri


def _wait(tasks: Sequence[Any], bar: Progress, shown: TaskID) -> None:
    """Until all are done, or have failed, which who asks for their results is told."""
    left = list(tasks)
    while left:
        done, left = ray.wait(left, fetch_local=False)
        bar.advance(shown, len(done))
    bar.update(shown, total=len(tasks))


@ray.remote(num_returns=2)
def _read(uri: str, units: list[Unit], reach: int, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of units, laid out, and how often each occurs."""
    stream = count.lay_out((read_unit(uri, unit, vocabulary) for unit in units), reach, vocabulary)
    return stream, count.frequencies(stream, vocabulary.text_stop)


@ray.remote
def _count(streams: list[Any], chosen: np.ndarray, first: int, stop: int, reach: int) -> count.Counts:
    return count.count(np.concatenate(ray.get(streams)), chosen, first, stop, reach)


@ray.remote(max_calls=1)  # a process of its own: it holds the most memory, and is to make way for others
def _factorise(counted: list[Any], columns: int, recipe: Recipe, uris: list[str]) -> str:
    # A run's worker has less than a core on a small machine, and others may need the rest.
    os.setpriority(os.PRIO_PROCESS, 0, max(FACTORS_PRIORITY, os.getpriority(os.PRIO_PROCESS, 0)))
    matrix = factorise.Information(ray.get(counted), columns)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    threads = min(MOST_THREADS, available)
    vectors = factorise.principal_vectors(matrix, recipe.components, threads=threads)
    del matrix
    for uri in uris[:-1]:
        try:
            files.write(uri, vectors)
            return uri
        except (InputError, OSError):  # a place that cannot be written
            continue
    files.write(uris[-1], vectors)
    return uris[-1]


@contextmanager
def _bar(show: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:>14}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, disable=not show) as bar:
        yield bar
