"""Which files of an input are read, and which are skipped.

An input is a file, a directory (searched to its bottom) or a glob, local or at any URI. Passed over are

- hidden files: a part of their path below the input begins with ``.`` or ``_``;
- files of other kinds, by their names;
- shards that an earlier `raybert prepare` wrote below its own input;
- a .json below the input that does not hold an object with the text column a line: only its content tells what it is.
"""

import codecs
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.parquet as pq

from raybert import storage
from raybert.data.shards import SCHEMA, SPLITS
from raybert.data.text.documents import (
    MAX_DOCUMENT_BYTES,
    SUFFIXES,
    kind_of,
    open_text,
    sentence_when_damaged,
    suffixes,
)
from raybert.errors import InputError

HIDDEN, OTHER_KIND, SHARD, NO_LINES = "hidden", "of other kinds", "shards of raybert", ".json without one text per line"
SHOWN = 3  # names of files, for each reason
_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d+-of-\d+\.parquet")


@dataclass(frozen=True)
class Passed:
    """A file that is skipped: its path below the input, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """The files of an input that are read, as full URIs in their order, and the others."""

    files: list[str]
    passed_over: list[Passed]


def _kind_of(uri: str) -> str:
    return kind_of(uri)[0]


def find(name: str, text_column: str, kind: Callable[[str], str] = _kind_of) -> Found:
    """The files of one input.

    Args:
        kind: of a file, by its name; empty when it is of another.

    Raises:
        InputError: there is no file that is read, or a .json is given that does not hold an object a line.
    """
    listed = storage.find_files(name)
    if not listed:
        storage.require_bucket(name)
        raise InputError(f"The input {name} does not exist or holds no files.")
    # Shards of one directory are of one kind: one of them is opened.
    folders = {posixpath.dirname(uri): uri for uri, below in listed if below and _SHARD.fullmatch(_base(uri))}
    with ThreadPoolExecutor(16) as pool:  # most of the time is waiting for the storage
        of_shards = {
            folder for folder, ours in zip(folders, pool.map(_is_shard, folders.values()), strict=True) if ours
        }

        def reason(file: tuple[str, str]) -> str:
            uri, below = file
            if why := _reason_by_name(uri, below, kind):
                return why
            if below and posixpath.dirname(uri) in of_shards and _SHARD.fullmatch(_base(uri)):
                return SHARD
            if suffixes(uri)[0] == ".json" and (fault := _fault_of_json(uri, text_column if below else "")):
                if not below:
                    raise InputError(fault)
                return NO_LINES
            return ""

        reasons = list(pool.map(reason, listed))
    found = _divide(listed, reasons)
    if not found.files:
        known = f"{' '.join(SUFFIXES)}; .gz or .zst of text"
        raise InputError(f"The input {name} contains no file of a known kind ({known}); {sentence(found.passed_over)}.")
    return found


def find_by_name(name: str, kind: Callable[[str], str]) -> Found:
    """As `find`, by the names of the files alone: none is opened. There may be no file that is read."""
    listed = storage.find_files(name)
    return _divide(listed, [_reason_by_name(uri, below, kind) for uri, below in listed])


def _reason_by_name(uri: str, below: str, kind: Callable[[str], str]) -> str:
    """Why a file is skipped, as far as its name says; empty when it does not."""
    return HIDDEN if is_hidden(below) else "" if kind(uri) else OTHER_KIND


def _divide(listed: Sequence[tuple[str, str]], reasons: Sequence[str]) -> Found:
    """Files and their paths below the input, by whether there is a reason to pass them over."""
    files = [uri for (uri, _), why in zip(listed, reasons, strict=True) if not why]
    passed = [Passed(below or _base(uri), why) for (uri, below), why in zip(listed, reasons, strict=True) if why]
    return Found(files, passed)


def is_hidden(below: str) -> bool:
    """Whether a part of a path below an input says that it is not for readers; the input itself may be called so."""
    return any(part.startswith((".", "_")) for part in below.split("/"))


def summary(passed: Iterable[Passed]) -> str:
    """How many files were skipped and why, with the names of a few: for a person."""
    names: dict[str, list[str]] = {}
    for file in passed:
        names.setdefault(file.reason, []).append(file.name)
    return ", ".join(
        f"{len(found):,} {reason} ({', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''})"
        for reason, found in names.items()
    )


def sentence(passed: Sequence[Passed]) -> str:
    """The `summary` as the line that every command shows; empty where nothing was skipped."""
    return f"skipped: {summary(passed)}" if passed else ""


def _base(uri: str) -> str:
    return posixpath.basename(uri)


def _is_shard(uri: str) -> bool:
    with sentence_when_damaged(uri), storage.open_uri(uri) as file:
        return bool(pq.read_schema(file).names == SCHEMA.names)


def _fault_of_json(uri: str, text_column: str) -> str:
    """What keeps a file from being read as JSON lines, as a sentence; empty when nothing does.

    Args:
        text_column: what its first object must have, if not empty.
    """
    with open_text(uri) as file:
        first = next((line for line in iter(lambda: file.readline(MAX_DOCUMENT_BYTES), b"") if line.strip()), None)
    if first is None:
        return ""  # of an empty file
    first = first.removeprefix(codecs.BOM_UTF8).lstrip()
    if first.startswith(b"["):
        return (
            f"{uri} contains one JSON array instead of one object per line; convert it: jq -c '.[]' FILE.json > "
            "FILE.jsonl"
        )
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        return (
            f"{uri} has no JSON object on its first line; put an object that spans several lines on one line: jq "
            "-c . FILE.json > FILE.jsonl"
        )
    return f"{uri} has no column {text_column}." if text_column and text_column not in row else ""
