"""Rows of a probe task's files: parquet, csv or jsonl at any URI, or an embedded corpus."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybert import storage
from raybert.data.text import csvfile, embedded
from raybert.data.text.documents import suffixes
from raybert.data.text.inputs import Passed, find_by_name, sentence
from raybert.data.text.values import Bad, column_values, json_objects, refusal, require_columns
from raybert.errors import InputError

# What fsspec's file systems call that which changes with the content: local, GCS, S3, Azure, the Hub.
VERSIONS = ("mtime", "etag", "ETag", "generation", "LastModified", "last_modified", "blob_id")
KINDS = (".parquet", ".csv", ".jsonl")
HOW = "in the task's YAML file"


@dataclass(frozen=True)
class Row:
    """Values of the wanted columns, and where they stand. A text is bytes where the file does not know it to be one."""

    values: tuple[Any, ...]
    file: str
    unit: str  # Line or Row
    number: int

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number} of {self.file}"


def columns(uri: str) -> list[str]:
    """Names of the columns of the first file at `uri`.

    Raises:
        InputError: there is no file, or it is of another kind or damaged.
    """
    if uri.startswith(embedded.SCHEME):
        return ["text", "label"]
    file = _files(uri)[0]
    with _opened(file) as stream:
        if _kind(file) == ".parquet":
            return list(pq.read_schema(stream).names)
        if _kind(file) == ".csv":
            return next(csvfile.records(stream, file))[1]
        line, row = next(_objects(stream), (0, {}))
        if isinstance(row, Bad):
            raise refusal(row, f"Line {line} of {file}")
        return list(row)


def rows(uri: str, wanted: Sequence[str]) -> Iterator[Row]:
    """The values of the wanted columns, row by row, in the order of the files' names.

    Raises:
        InputError: there is no file, a column is missing, or a file is damaged.
    """
    if uri.startswith(embedded.SCHEME):
        yield from _embedded_rows(uri, wanted)
        return
    for file in _files(uri):
        reader = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}[_kind(file)]
        with _opened(file) as stream:
            yield from reader(stream, file, wanted)


def stamp(uri: str) -> str:
    """Changes when a file at `uri` changes: the names, sizes and versions that storage reports, without reading."""
    if uri.startswith(embedded.SCHEME):
        return ""
    found = []
    for file in _files(uri):
        fs, path = storage.filesystem(file)
        about = fs.info(path)
        found.append((file, about.get("size"), [str(about[key]) for key in VERSIONS if key in about]))
    return repr(found)


def passed_over(uri: str) -> list[Passed]:
    """The files at `uri` that are not read: hidden ones, and those of other kinds."""
    return [] if uri.startswith(embedded.SCHEME) else find_by_name(uri, _kind).passed_over


def _files(uri: str) -> list[str]:
    found = find_by_name(uri, _kind)
    if not found.files and not found.passed_over:
        raise InputError(f"There is no file at {uri}.")
    if not found.files:
        raise InputError(
            f"{uri} contains no file that a probe task can read ({' '.join(KINDS)}); {sentence(found.passed_over)}."
        )
    return found.files


def _kind(file: str) -> str:
    """The end of a file's name in lower case, if it is of a kind that is read here."""
    name, compression = suffixes(file)
    return name if name in KINDS and not compression else ""


@contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    """The file, open; what pyarrow raises for a damaged one becomes an InputError. Storage that is away does not."""
    with storage.open_uri(file) as stream:
        try:
            yield stream
        except InputError:
            raise
        except (pa.ArrowException, ValueError) as error:
            raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _parquet(stream: IO[bytes], file: str, wanted: Sequence[str]) -> Iterator[Row]:
    parquet = pq.ParquetFile(stream)
    require_columns(file, wanted, parquet.schema_arrow.names, HOW)
    number = 0
    for batch in parquet.iter_batches(columns=list(dict.fromkeys(wanted))):
        for values in zip(*(column_values(batch.column(name)) for name in wanted), strict=True):
            number += 1
            yield Row(values, file, "Row", number)


def _csv(stream: IO[bytes], file: str, wanted: Sequence[str]) -> Iterator[Row]:
    records = csvfile.records(stream, file)
    _, header = next(records)
    require_columns(file, wanted, header, HOW)
    places = [header.index(name) for name in wanted]
    for line, values in records:
        yield Row(tuple(values[place] for place in places), file, "Line", line)


def _jsonl(stream: IO[bytes], file: str, wanted: Sequence[str]) -> Iterator[Row]:
    for line, row in _objects(stream):
        if isinstance(row, Bad):
            raise refusal(row, f"Line {line} of {file}")
        require_columns(f"Line {line} of {file}", wanted, list(row), HOW)
        yield Row(tuple(row[name] for name in wanted), file, "Line", line)


def _objects(stream: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    return json_objects(io.BufferedReader(stream))  # type: ignore


def _embedded_rows(uri: str, wanted: Sequence[str]) -> Iterator[Row]:
    embedded.texts(uri)  # refuses a name that is none
    texts, labels, names = embedded.bbc_news()
    require_columns(uri, wanted, ["text", "label"], HOW)
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        values = {"text": text, "label": names[label]}
        yield Row(tuple(values[name] for name in wanted), uri, "Text", number)
