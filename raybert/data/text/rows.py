"""Tables of texts for embedding, row by row with their other columns: parquet, csv, jsonl, or a text a line."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raybert import storage
from raybert.data.text import corpus, csvfile, inputs
from raybert.data.text.columns import TEXT, Kind, array, kinds_of, merge_all
from raybert.data.text.documents import MAX_DOCUMENT_BYTES, Piece, kind_of, lines, sentence_when_damaged, suffixes
from raybert.data.text.values import (
    HALF_PAIR,
    MISSING,
    Bad,
    column_values,
    decode,
    is_unicode,
    json_objects,
    refusal,
    refuse_twins,
    require_columns,
    text_of,
)
from raybert.errors import InputError

T = TypeVar("T")
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
    passed_over: str = ""  # a line for a person: which files of the input are not read, and why


def plan(uri: str, text_column: str) -> Source:
    """Look at every file of an input: a file, a directory or a glob at any URI.

    A text file (.txt, also .gz or .zst) has a text a line, and the one column `text`.

    Raises:
        InputError: there is no file of a known kind, files of several kinds, or no such column.
    """
    uri = storage.absolute(uri)
    found = inputs.find(uri, text_column, _kind)
    files, passed_over = found.files, inputs.sentence(found.passed_over)
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise InputError(
            f"{uri} contains files of several kinds ({', '.join(sorted(kinds))}); give one kind at a time."
        )
    if kinds == {"csv"}:
        pieces, identity = _plan_csv(files, text_column)
        return Source(pieces, text_column, identity, passed_over)
    column = LINE_COLUMN if kinds == {"txt"} else text_column
    fragments, about = corpus.share_out(sorted(files), column, fragment_bytes=PIECE_BYTES, lines=True)
    return Source([piece for part in fragments for piece in part], column, about["fingerprint"], passed_over)


def _kind(uri: str) -> str:
    return "csv" if suffixes(uri) == (".csv", "") else kind_of(uri)[0]


def _plan_csv(files: list[str], text_column: str) -> tuple[list[Piece], str]:
    """Quoted line ends make a csv file hard to cut: each is one piece."""
    pieces = [Piece(file, "csv", 0, 0, storage.size(file)) for file in files]
    for piece in pieces:
        _, header = next(_csv_records(piece.uri))
        require_columns(piece.uri, [text_column], header)
    digests = (corpus.file_digest(piece.uri, piece.size) for piece in pieces)
    return pieces, corpus.joint_digest(digests)


def kinds(piece: Piece, text_column: str) -> dict[str, Kind]:
    """What the values of each column have in common: of JSON lines, since other files have types of their own.

    Those of several pieces are joined with `columns.merge_all`, in the order of the pieces.

    Raises:
        InputError: the file is damaged, or a row holds no text.
    """
    found: dict[str, Kind] = {}
    if piece.kind != "jsonl":
        return found
    for chunk in _batches(_objects(piece, text_column, others=True)):
        found = merge_all(found, kinds_of(chunk))
    return found | {text_column: TEXT}


def read(
    piece: Piece, text_column: str, kinds_of_all: dict[str, Kind] | None = None, *, others: bool = True
) -> Iterator[pa.Table]:
    """The piece's rows in batches, at least one. The values of csv are strings; those of JSON lines have the type that
    they share in all pieces, and are JSON text where they share none.

    Args:
        kinds_of_all: `kinds` of all pieces; by default those of this one.
        others: with the other columns, not the text alone.

    Raises:
        InputError: the file is damaged, a row holds no text, or two columns have one name.
    """
    if piece.kind == "parquet":
        yield from _parquet(piece, text_column, others)
    elif piece.kind == "csv":
        yield from _csv(piece.uri, text_column, others)
    elif piece.kind == "txt":
        yield from _text_tables(lines(piece.uri, piece.start, _stop(piece)), piece.uri, piece.start)
    else:
        if not others:
            kinds_of_all = {text_column: TEXT}
        elif kinds_of_all is None:
            kinds_of_all = kinds(piece, text_column)
        for chunk in _batches(_objects(piece, text_column, others=False)):
            yield pa.table({name: array([row.get(name) for row in chunk], kind) for name, kind in kinds_of_all.items()})


def read_lines(stream: Iterable[bytes], name: str) -> Iterator[pa.Table]:
    """A text a line from an open stream, as tables with the column `text`.

    Raises:
        InputError: a line is not UTF-8.
    """
    return _text_tables(stream, name, 0)


def row_count(parquet: pq.ParquetFile, groups: Iterable[int]) -> int:
    return sum(parquet.metadata.row_group(i).num_rows for i in groups)


def _parquet(piece: Piece, text_column: str, others: bool) -> Iterator[pa.Table]:
    with sentence_when_damaged(piece.uri), storage.open_uri(piece.uri) as file:
        parquet = pq.ParquetFile(file)
        if others:
            refuse_twins(piece.uri, parquet.schema_arrow.names, parquet.schema_arrow.names)
        row = row_count(parquet, range(piece.start))
        groups = range(piece.start, piece.stop)
        columns = None if others else [text_column]
        if not row_count(parquet, groups):  # "at least one" table, with the columns
            empty = parquet.schema_arrow.empty_table()
            yield empty if others else empty.select([text_column])
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
            for value in column_values(batch.column(text_column)):
                row += 1
                if bad := _unusable(value):
                    raise refusal(bad, f"Row {row} of {piece.uri}", text_column)
            yield pa.Table.from_batches([batch])


def _csv(uri: str, text_column: str, others: bool) -> Iterator[pa.Table]:
    records = _csv_records(uri)
    _, header = next(records)
    names = header if others else [text_column]
    refuse_twins(uri, header, names)
    places = [header.index(name) for name in names]
    for chunk in _batches(values for _, values in records):
        columns = [pa.array([values[place] for values in chunk], pa.string()) for place in places]
        yield pa.table(columns, names)


def _csv_records(uri: str) -> Iterator[tuple[int, list[str]]]:
    with sentence_when_damaged(uri), storage.open_uri(uri) as file:
        yield from csvfile.records(file, uri)


def _text_tables(found: Iterable[bytes], uri: str, start: int) -> Iterator[pa.Table]:
    def texts() -> Iterator[str]:
        for number, line in enumerate(found, start=1):
            text = decode(line.rstrip(b"\r\n"), MAX_DOCUMENT_BYTES)
            if isinstance(text, Bad):
                raise refusal(text, _line(uri, start, number))
            yield text

    for chunk in _batches(texts()):
        yield pa.table({LINE_COLUMN: pa.array(chunk, pa.string())})


def _objects(piece: Piece, text_column: str, *, others: bool) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines whose text is known to be one; with `others` every string in them is known to be."""
    for number, row in json_objects(lines(piece.uri, piece.start, _stop(piece)), MAX_DOCUMENT_BYTES):
        if isinstance(row, Bad):
            raise refusal(row, _line(piece.uri, piece.start, number))
        if text_column not in row:
            require_columns(_line(piece.uri, piece.start, number), [text_column], list(row))
        if bad := _unusable(row[text_column]):
            raise refusal(bad, _line(piece.uri, piece.start, number), text_column)
        if others and not is_unicode(json.dumps({**row, text_column: None}, ensure_ascii=False)):
            raise refusal(HALF_PAIR, _line(piece.uri, piece.start, number))
        yield row


def _unusable(value: Any) -> Bad | None:
    """Why a value of the text column cannot be embedded; one that is missing can, as an empty text."""
    text = text_of(value)
    return text if isinstance(text, Bad) and text != MISSING else None


def _batches(rows: Iterator[T]) -> Iterator[list[T]]:
    """The rows in lists; an empty list where there is none, so that an empty table has its columns too."""
    yield list(itertools.islice(rows, BATCH_ROWS))
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        yield chunk


def _stop(piece: Piece) -> int | None:
    return None if kind_of(piece.uri)[1] else piece.stop


def _line(uri: str, start: int, number: int) -> str:
    """The name of the line that is the `number`th of those that begin at byte `start` or later."""
    before = sum(1 for _ in lines(uri, 0, start)) if start else 0
    return f"Line {before + number} of {uri}"
