"""Which raw text there is, and how it is shared out among tasks.

    *.parquet                              one document a row, in the text column
    *.jsonl *.ndjson *.json (.gz .zst)     one document a line, under the text column's key
    *.txt (.gz .zst)                       one document a file, or a run of lines, or a line

Which files of an input are read stands in raybert.data.text.inputs; ``embedded://bbc_news`` is a corpus that a Python
package brings along.
"""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybert import storage
from raybert.data.text import embedded
from raybert.data.text.documents import Bad, Piece, json_rows, kind_of, sentence_when_damaged
from raybert.data.text.embedded import bbc_news as bbc_news
from raybert.data.text.inputs import Found, Passed, find
from raybert.data.text.values import TEXT_TYPES, require_columns
from raybert.errors import InputError

FRAGMENT_BYTES = 16 << 20  # of text, about: what one task reads, and what its memory is measured by
SAMPLE_BYTES = 64 << 10  # of each end of a file, for the fingerprint


@dataclass(frozen=True)
class Corpus:
    """The input, shared out: a fragment is the pieces that one task reads. ``inputs`` identifies it in a manifest."""

    fragments: list[list[Piece]]
    inputs: dict[str, Any]
    files: list[str]
    passed_over: list[Passed]


def plan(
    names: Sequence[str], text_column: str, *, fragment_bytes: int = FRAGMENT_BYTES, lines: bool = False
) -> Corpus:
    """List the input files, look into each, and share them out in fragments of about `fragment_bytes`.

    With `lines` a text file is not one document, and may be cut between lines.

    The fingerprint is made of each file's size, first and last 64 KB, without names and in no order: the same files
    elsewhere are the same input. A change in the middle of a large file that keeps its size goes unnoticed.

    Raises:
        InputError: an input is missing, empty or of no known kind, or its text column is missing or holds no text.
    """
    found = [_find(name, text_column) for name in names]
    files = sorted({uri for part in found for uri in part.files})
    fragments, about = share_out(files, text_column, fragment_bytes=fragment_bytes, lines=lines)
    return Corpus(fragments, about, files, [passed for part in found for passed in part.passed_over])


def share_out(
    files: Sequence[str], text_column: str, *, fragment_bytes: int, lines: bool
) -> tuple[list[list[Piece]], dict[str, Any]]:
    """The fragments of these files, and what identifies them, as `plan` has both."""
    with ThreadPoolExecutor(16) as pool:  # most of the time is waiting for the storage
        look = partial(_look, text_column=text_column, fragment_bytes=fragment_bytes, lines=lines)
        looked = list(pool.map(look, files))
    fragments: list[list[Piece]] = []
    filled = 0
    for piece in (piece for pieces, _ in looked for piece in pieces):
        if not fragments or filled + piece.size > fragment_bytes:
            fragments.append([])
            filled = 0
        fragments[-1].append(piece)
        filled += max(piece.size, SAMPLE_BYTES)  # opening a file costs about as much as reading this
    fingerprint = joint_digest(digest for _, digest in looked)
    if not fragments:
        raise InputError(f"The input contains no documents: {files[0]} is empty.")
    empty = sum(not pieces for pieces, _ in looked)
    counted = {"empty_files": empty} if empty else {}
    return fragments, {"files": len(files), **counted, "fingerprint": fingerprint}


def joint_digest(digests: Iterable[str]) -> str:
    """One digest for those of several files, in any order."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def file_digest(uri: str, size: int) -> str:
    """Stands for a file's content: its size, first and last 64 KB."""
    head = storage.read_range(uri, 0, min(size, SAMPLE_BYTES))
    tail = storage.read_range(uri, max(0, size - SAMPLE_BYTES), size)
    return hashlib.sha256(b"%d " % size + head + tail).hexdigest()


def _find(name: str, text_column: str) -> Found:
    return Found([name], []) if name.startswith(embedded.SCHEME) else find(name, text_column)


def _look(uri: str, *, text_column: str, fragment_bytes: int, lines: bool) -> tuple[list[Piece], str]:
    """The pieces of one file and the digest that stands for it."""
    kind, compression = kind_of(uri)
    if kind == "embedded":
        texts = embedded.texts(uri)
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return [Piece(uri, kind, 0, 0, sum(map(len, texts)))], digest
    with sentence_when_damaged(uri):
        size = storage.size(uri)
        digest = file_digest(uri, size)
    if kind == "parquet":
        return _look_into_parquet(uri, text_column, fragment_bytes), digest
    if kind == "jsonl" and not _look_into_jsonl(uri, text_column):
        return [], digest
    if (kind == "txt" and not lines) or compression:
        return [Piece(uri, kind, 0, size, size)], digest
    ranges = [(start, min(start + fragment_bytes, size)) for start in range(0, size, fragment_bytes)]
    return [Piece(uri, kind, start, stop, stop - start) for start, stop in ranges], digest


def _look_into_parquet(uri: str, text_column: str, fragment_bytes: int) -> list[Piece]:
    with sentence_when_damaged(uri), storage.open_uri(uri) as file:
        parquet = pq.ParquetFile(file)
        metadata, schema = parquet.metadata, parquet.schema_arrow
    require_columns(uri, [text_column], schema.names)
    kind = schema.field(text_column).type
    if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in TEXT_TYPES:
        raise InputError(f"Column {text_column} of {uri} contains {kind}, not text; name another with --text-column.")
    sizes = [_column_bytes(metadata.row_group(i), text_column) for i in range(metadata.num_row_groups)]
    pieces, start = [], 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[start : stop + 1]) > fragment_bytes:
            pieces.append(Piece(uri, "parquet", start, stop, sum(sizes[start:stop])))
            start = stop
    return pieces


def _column_bytes(group: pq.RowGroupMetaData, name: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)


def _look_into_jsonl(uri: str, text_column: str) -> bool:
    """Whether it has any line. Refuse a file whose first object lacks the key; lines that are no objects are counted
    later.
    """
    rows = 0
    for row in json_rows(uri):
        rows += 1
        if not isinstance(row, Bad):
            require_columns(uri, [text_column], list(row))
            break
    return rows > 0
