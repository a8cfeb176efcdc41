"""The documents in one file, or in a part of it: Parquet, JSON lines and plain text, compressed or not."""

import codecs
import gzip
import io
import posixpath
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from raybert import storage
from raybert.data.text import embedded
from raybert.data.text.values import MISSING, Bad, column_values, decode, json_objects, text_of
from raybert.data.text.zst import open_zst
from raybert.errors import InputError
from raybert.storage.uri import HTTP, scheme

MAX_DOCUMENT_BYTES = 64 << 20  # a larger document is counted as bad: a task holds one whole
SUFFIXES = {
    **{".parquet": "parquet", ".pq": "parquet"},
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"},  # of .json see raybert.data.text.inputs
    ".txt": "txt",
}
COMPRESSIONS = {".gz": ".gz", ".zst": ".zst", ".zstd": ".zst"}
SPLIT_TXT = ("blank-lines", "lines")  # where one document of a text file ends, if it is not one document


@dataclass(frozen=True)
class Piece:
    """Part of an input: row groups (parquet) or bytes (jsonl) ``start`` to ``stop``, else all of it.

    ``size`` is the bytes to be read, of the text column where that is known.
    """

    uri: str
    kind: str
    start: int
    stop: int
    size: int


def kind_of(uri: str) -> tuple[str, str]:
    """(kind, compression) by a file's name; the kind is empty when it is none of ours."""
    if uri.startswith(embedded.SCHEME):
        return "embedded", ""
    name, compression = suffixes(uri)
    kind = SUFFIXES.get(name, "")
    return ("", "") if kind == "parquet" and compression else (kind, compression)


def suffixes(uri: str) -> tuple[str, str]:
    """The end of a file's name, and what it is compressed with: (".jsonl", ".zst") of ``http://host/A.JSONL.zstd?v=1``."""
    if scheme(uri) in HTTP:
        uri = uri.partition("?")[0].partition("#")[0]
    stem, suffix = posixpath.splitext(uri.lower())
    compression = COMPRESSIONS.get(suffix, "")
    return (posixpath.splitext(stem)[1] if compression else suffix), compression


def documents(piece: Piece, text_column: str, split_txt: str = "") -> Iterator[str | Bad]:
    """The texts of a piece, and a Bad in the place of each that cannot be used.

    Args:
        split_txt: what ends a document of a text file: one of SPLIT_TXT, or the end of the file when empty.

    Raises:
        InputError: the file itself is damaged or cannot be read.
    """
    if piece.kind == "embedded":
        yield from embedded.texts(piece.uri)
    elif piece.kind == "txt":
        yield from _txt_documents(piece, split_txt)
    elif piece.kind == "parquet":
        yield from _parquet_documents(piece, text_column)
    else:
        stop = None if kind_of(piece.uri)[1] else piece.stop
        for row in json_rows(piece.uri, piece.start, stop):
            yield row if isinstance(row, Bad) else text_of(row.get(text_column))


@contextmanager
def sentence_when_damaged(uri: str) -> Iterator[None]:
    """Turn what readers raise for a damaged file into an InputError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException) as error:
        raise InputError(f"{uri} cannot be read ({error}); it may be truncated or damaged.") from error


@contextmanager
def open_text(uri: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, through gzip or Zstandard where its name says so.

    Raises:
        InputError: it cannot be opened, or turns out to be damaged inside the ``with``.
    """
    compression = kind_of(uri)[1]
    with sentence_when_damaged(uri), storage.open_uri(uri) as file:
        if compression == ".gz":
            yield gzip.GzipFile(fileobj=file)  # type: ignore[misc]
        elif compression == ".zst":
            yield open_zst(file)
        else:
            yield io.BufferedReader(file, 1 << 20)  # type: ignore


def json_rows(uri: str, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any] | Bad]:
    """The objects on the lines that begin in bytes ``start`` to ``stop``; blank lines are skipped."""
    for _, row in json_objects(lines(uri, start, stop), MAX_DOCUMENT_BYTES):
        yield row


def lines(uri: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The lines that begin in bytes ``start`` to ``stop``, with their ends; of a line too large its first part."""
    for _, line in _placed_lines(uri, start, stop):
        yield line


def _placed_lines(uri: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    with open_text(uri) as file:
        if start:  # a line that began before is not ours; one that begins exactly here is
            file.seek(start - 1)
            _skip_line(file)
        place = file.tell()
        while (stop is None or place < stop) and (line := file.readline(MAX_DOCUMENT_BYTES + 1)):
            after = place + len(line)
            if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                after = file.tell()
            yield place, line
            place = after


def _txt_documents(piece: Piece, split_txt: str) -> Iterator[str | Bad]:
    stop = None if kind_of(piece.uri)[1] else piece.stop
    if not split_txt:
        with open_text(piece.uri) as file:
            yield _decode(file.read(MAX_DOCUMENT_BYTES + 1))
    elif split_txt == "lines":
        for line in lines(piece.uri, piece.start, stop):
            if not _is_blank(line):
                yield _decode(line)
    else:
        for data in _paragraphs(piece.uri, piece.start, stop):
            yield _decode(data)


def _paragraphs(uri: str, start: int, stop: int | None) -> Iterator[bytes]:
    """The runs of lines that are not blank. A run is that part's in which the blank line before it begins; of a run
    too large the first part comes.
    """
    run, size, ours = [], 0, start == 0
    for place, line in _placed_lines(uri, start, None):
        over = stop is not None and place >= stop
        if over and not ours:
            return
        if not _is_blank(line):
            if ours and size <= MAX_DOCUMENT_BYTES:
                run.append(line)
                size += len(line)
            continue
        if run:
            yield b"".join(run)
            run, size = [], 0
        if over:
            return
        ours = True
    if run:
        yield b"".join(run)


def _is_blank(line: bytes) -> bool:
    """Also with spaces that are not ASCII, or with the mark that may begin a file."""
    if line.isascii():
        return line.isspace()
    return not line.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip()


def _skip_line(file: IO[bytes]) -> None:
    while True:
        part = file.readline(1 << 20)
        if not part or part.endswith(b"\n"):
            return


def _decode(data: bytes) -> str | Bad:
    return decode(data, MAX_DOCUMENT_BYTES)


def _parquet_documents(piece: Piece, text_column: str) -> Iterator[str | Bad]:
    with sentence_when_damaged(piece.uri), storage.open_uri(piece.uri) as file:
        # A buffered read takes a large row group page by page.
        parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        groups = range(piece.start, piece.stop)
        for batch in parquet.iter_batches(128, row_groups=groups, columns=[text_column], use_threads=False):
            for value in column_values(batch.column(0)):
                yield MISSING if value is None else _decode(value)
