"""Rows of a probe task's files: parquet, csv or jsonl at any URI, or an embedded corpus."""

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybert import storage
from raybert.data.text import embedded
from raybert.errors import InputError

ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that Excel puts first
# What fsspec's file systems call that which changes with the content: local, GCS, S3, Azure, the Hub.
VERSIONS = ("mtime", "etag", "ETag", "generation", "LastModified", "last_modified", "blob_id")
KINDS = (".parquet", ".csv", ".jsonl")
Row = tuple[Any, ...]


def columns(uri: str) -> list[str]:
    """Names of the columns of the first file at `uri`.

    Raises:
        InputError: there is no file, or it is of another kind or damaged.
    """
    if uri.startswith(embedded.SCHEME):
        return ["text", "label"]
    file = _files(uri)[0]
    with _sentence(file), storage.open_uri(file) as stream:
        if file.endswith(".parquet"):
            return list(pq.read_schema(stream).names)
        text = io.TextIOWrapper(stream, encoding=ENCODING, newline="")
        if file.endswith(".csv"):
            return next(csv.reader(text), [])
        return list(json.loads(text.readline() or "{}"))


def rows(uri: str, wanted: Sequence[str]) -> Iterator[Row]:
    """The values of the wanted columns, row by row, in the order of the files' names.

    Raises:
        InputError: there is no file, a column is missing, or a file is damaged.
    """
    if uri.startswith(embedded.SCHEME):
        yield from _embedded_rows(uri, wanted)
        return
    for file in _files(uri):
        reader = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}[posixpath.splitext(file)[1]]
        with _sentence(file), storage.open_uri(file) as stream:
            yield from reader(stream, file, wanted)


def stamp(uri: str) -> str:
    """Changes when a file at `uri` changes: the names, sizes and versions that storage tells of, without reading."""
    if uri.startswith(embedded.SCHEME):
        return ""
    found = []
    for file in _files(uri):
        fs, path = storage.filesystem(file)
        about = fs.info(path)
        found.append((file, about.get("size"), [str(about[key]) for key in VERSIONS if key in about]))
    return repr(found)


def _files(uri: str) -> list[str]:
    found = [file for file in storage.list_files(uri) if not posixpath.basename(file).startswith((".", "_"))]
    if not found:
        raise InputError(f"There is no file at {uri}.")
    known = [file for file in found if file.endswith(KINDS)]
    if not known:
        raise InputError(f"{found[0]} is none of the kinds that a probe task reads: {', '.join(KINDS)}.")
    return known


class _sentence:  # noqa: N801 - used like a function
    """Turns what a damaged file raises into an InputError that names the file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | csv.Error | ValueError) and not isinstance(error, InputError):
            raise InputError(f"{self.file} cannot be read: {' '.join(str(error).split())}") from error


def _parquet(stream: Any, file: str, wanted: Sequence[str]) -> Iterator[Row]:
    parquet = pq.ParquetFile(stream)
    _require(file, wanted, parquet.schema_arrow.names)
    for batch in parquet.iter_batches(columns=list(dict.fromkeys(wanted))):
        yield from zip(*(batch.column(name).to_pylist() for name in wanted), strict=True)


def _csv(stream: Any, file: str, wanted: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(1 << 27)  # a text of more than the default 128 KB is no error
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding=ENCODING, newline=""))
    _require(file, wanted, reader.fieldnames or [])
    for row in reader:
        yield tuple(row[name] for name in wanted)


def _jsonl(stream: Any, file: str, wanted: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(io.TextIOWrapper(stream, encoding=ENCODING), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"Line {number} of {file} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise InputError(f"Line {number} of {file} is no JSON object.")
        _require(f"Line {number} of {file}", wanted, list(row))
        yield tuple(row[name] for name in wanted)


def _embedded_rows(uri: str, wanted: Sequence[str]) -> Iterator[Row]:
    embedded.texts(uri)  # refuses a name that is none
    texts, labels, names = embedded.bbc_news()
    _require(uri, wanted, ["text", "label"])
    for text, label in zip(texts, labels, strict=True):
        values = {"text": text, "label": names[label]}
        yield tuple(values[name] for name in wanted)


def _require(place: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"{place} has no column {missing[0]}; it has {', '.join(found)}.")
