"""Tables of texts for embedding, row by row with their other columns: parquet, csv, jsonl, or a text a line."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from raybert import storage
from raybert.data.text import corpus, inputs
from raybert.data.text.documents import Bad, Piece, json_rows, kind_of, lines, sentence_when_damaged, suffixes
from raybert.errors import InputError

BATCH_ROWS = 1024
# Of text, about: minutes of work for one CPU, so that little is done again after an interruption.
PIECE_BYTES = 4 << 20
LINE_COLUMN = "text"


@dataclass(frozen=True)
class Source:
    """An input cut into pieces that can be read alone, in the order of its rows. `identity` changes when it does."""

    pieces: Sequence[Piece]
    text_column: str
    identity: str


def plan(uri: str, text_column: str) -> Source:
    """Look at every file of an input: a file, a directory or a glob at any URI.

    A text file (.txt, also .gz or .zst) has a text a line, and the one column `text`.

    Raises:
        InputError: there is no file of a known kind, files of several kinds, or no such column.
    """
    uri = storage.absolute(uri)
    files = inputs.find(uri, text_column, _kind).files
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise InputError(f"{uri} holds files of several kinds ({', '.join(sorted(kinds))}); give one kind at a time.")
    if kinds == {"csv"}:
        return _plan_csv(files, text_column)
    column = LINE_COLUMN if kinds == {"txt"} else text_column
    found = corpus.plan([uri], column, fragment_bytes=PIECE_BYTES, lines=True)
    pieces = [piece for fragment in found.fragments for piece in fragment]
    return Source(pieces, column, found.inputs["fingerprint"])


def _kind(uri: str) -> str:
    return "csv" if suffixes(uri) == (".csv", "") else kind_of(uri)[0]


def _plan_csv(files: list[str], text_column: str) -> Source:
    """Quoted line ends make a csv file hard to cut: each is one piece."""
    pieces = []
    for file in files:
        pieces.append(Piece(file, "csv", 0, 0, storage.size(file)))
        for table in itertools.islice(_csv(file), 1):
            if text_column not in table.column_names:
                names = ", ".join(table.column_names)
                raise InputError(f"{file} has no column {text_column}; choose one of {names} with --text-column.")
    digests = (corpus.file_digest(piece.uri, piece.size) for piece in pieces)
    return Source(pieces, text_column, corpus.joint_digest(digests))


def read(piece: Piece, text_column: str) -> Iterator[pa.Table]:
    """The piece's rows in batches, with all their columns.

    Raises:
        InputError: the file is damaged, or a row holds no text.
    """
    if piece.kind == "parquet":
        yield from _parquet(piece)
    elif piece.kind == "csv":
        yield from _csv(piece.uri)
    else:
        stop = None if kind_of(piece.uri)[1] else piece.stop
        with sentence_when_damaged(piece.uri):
            if piece.kind == "txt":
                yield from _tables(_texts(lines(piece.uri, piece.start, stop), piece.uri))
            else:
                yield from _tables(_checked(json_rows(piece.uri, piece.start, stop), piece.uri, text_column))


def read_lines(stream: Iterable[bytes], name: str) -> Iterator[pa.Table]:
    """A text a line from an open stream, as tables with the column `text`.

    Raises:
        InputError: a line is not UTF-8.
    """
    return _tables(_texts(stream, name))


def _parquet(piece: Piece) -> Iterator[pa.Table]:
    with sentence_when_damaged(piece.uri), storage.open_uri(piece.uri) as file:
        groups = range(piece.start, piece.stop)
        for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, row_groups=groups, use_threads=False):
            yield pa.Table.from_batches([batch])


def _csv(uri: str) -> Iterator[pa.Table]:
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with sentence_when_damaged(uri), storage.open_uri(uri) as file, pa.PythonFile(file, mode="r") as source:
        for batch in pyarrow.csv.open_csv(source, parse_options=options):
            for start in range(0, len(batch), BATCH_ROWS):
                yield pa.Table.from_batches([batch.slice(start, BATCH_ROWS)])


def _tables(rows: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        # pyarrow takes the columns from the first row.
        columns = dict.fromkeys(name for row in chunk for name in row)
        yield pa.Table.from_pylist([{**columns, **chunk[0]}, *chunk[1:]])


def _texts(found: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
    for line in found:
        try:
            yield {LINE_COLUMN: line.rstrip(b"\r\n").decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise InputError(f"A line of {name} is not UTF-8: {line[:40]!r}.") from error


def _checked(rows: Iterator[dict[str, Any] | Bad], uri: str, text_column: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        if isinstance(row, Bad):
            raise InputError(f"A line of {uri} cannot be used: {row.reason}.")
        if text_column not in row:
            raise InputError(f"A line of {uri} has no {text_column}; it has {', '.join(row)}.")
        yield row
