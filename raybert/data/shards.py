"""The shard set: Parquet files of windows and the manifest that vouches for them. No Ray here.

    OUTPUT/train-00000-of-00004.parquet ...   OUTPUT/validation-00000-of-00001.parquet   OUTPUT/manifest.json
    OUTPUT/tokenizer/     of a set with another tokenizer than raybert's own

A row is a window: ``tokens`` (binary, little endian: uint16, or uint32 where the vocabulary has more than 65,535
tokens), ``ends`` (binary: uint16, where its sentences end; the last one is the number of tokens) and ``doc`` (int64,
the hash of its document). A row group is a *unit*: ``unit_rows`` rows (fewer in the last one of a shard) that one range
request reads. The manifest is written last, so a directory without one is not a shard set.
"""

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raybert import storage
from raybert.data import manifest
from raybert.data.units import Unit, UnitRows
from raybert.errors import InputError
from raybert.tokenizer import GPT2, TextTokenizer, Vocabulary
from raybert.tokenizer import files as tokenizers

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
# Tokens shrink by a quarter (1.60 bytes each instead of 2.11) and a core still decodes over 200 M of them a second.
COMPRESSION = "zstd"
COLUMNS = {"tokens": "BYTE_ARRAY", "ends": "BYTE_ARRAY", "doc": "INT64"}
SCHEMA = pa.schema([("tokens", pa.binary()), ("ends", pa.binary()), ("doc", pa.int64())])


@dataclass(frozen=True)
class Shard:
    """One file of a shard set, as the manifest lists it."""

    name: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardSet:
    """A shard set, as its manifest describes it. ``counts`` and ``inputs`` say what was read and what was dropped."""

    uri: str
    seq_len: int
    unit_rows: int
    vocabulary: Vocabulary
    tokenizer_name: str
    manifest_hash: str
    splits: Mapping[str, tuple[Shard, ...]]
    counts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def shards(self, split: str = "train") -> tuple[Shard, ...]:
        """The files of a split; none when no window fell into it."""
        return self.splits[split]

    def units(self, split: str = "train") -> list[Unit]:
        """Every unit of a split, in the order of the files."""
        return [
            Unit(shard.name, group, min(self.unit_rows, shard.rows - first))
            for shard in self.shards(split)
            for group, first in enumerate(range(0, shard.rows, self.unit_rows))
        ]

    def rows(self, split: str = "train") -> int:
        return sum(shard.rows for shard in self.shards(split))

    def tokens(self, split: str = "train") -> int:
        return sum(shard.tokens for shard in self.shards(split))

    @property
    def tokenizer_hash(self) -> str:
        return self.vocabulary.hash

    def tokenizer(self) -> TextTokenizer:
        """
        Raises:
            InputError: as `kept_tokenizer`.
        """
        return tokenizers.own_or(self.kept_tokenizer())

    def kept_tokenizer(self) -> TextTokenizer | None:
        """The set's own copy; none where its tokenizer is raybert's own, which takes time to load and not all need.

        Raises:
            InputError: the copy is damaged, or another one than the set was made with.
        """
        if self.vocabulary == GPT2:
            return None
        uri = storage.join(self.uri, tokenizers.DIRECTORY)
        found = tokenizers.load(uri)
        if found.hash != self.tokenizer_hash:
            raise InputError(f"{uri} is not the tokenizer that the shards were prepared with; prepare the data again.")
        return found

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for split in SPLITS for shard in self.shards(split))


def shard_name(split: str, number: int, count: int) -> str:
    return f"{split}-{number:05d}-of-{count:05d}.parquet"


def write_shard(uri: str, name: str, rows: UnitRows, unit_rows: int) -> Shard:
    """Write windows, in the order given, as the shard ``uri/name``. The same rows give the same bytes."""
    table = pa.table(
        {
            "tokens": binary_column(rows.tokens, rows.token_offsets),
            "ends": binary_column(rows.ends, rows.end_offsets),
            "doc": pa.array(rows.doc, pa.int64()),
        },
        schema=SCHEMA,
    )
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=unit_rows,
        compression=COMPRESSION,
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
        write_page_checksum=True,
    )
    data = sink.getvalue()
    storage.write_bytes(storage.join(uri, name), data)
    return Shard(name, len(rows), len(rows.tokens), len(data), hashlib.sha256(data).hexdigest())


def binary_column(values: np.ndarray, offsets: np.ndarray) -> pa.Array:
    """A column whose row i holds ``values[offsets[i]:offsets[i + 1]]``, little endian: uint32 as it is, else uint16."""
    flat = np.ascontiguousarray(values, dtype="<u4" if values.dtype == np.uint32 else "<u2")
    places = (offsets * flat.itemsize).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, pa.py_buffer(places), pa.py_buffer(flat)])


def write_manifest(
    uri: str,
    *,
    seq_len: int,
    unit_rows: int,
    splits: Mapping[str, Sequence[Shard]],
    counts: Mapping[str, Any],
    settings: Mapping[str, Any],
    inputs: Mapping[str, Any],
    tokenizer: TextTokenizer | None = None,
) -> ShardSet:
    """Finish a shard set: from now on it can be opened. Holds no time and no path, so equal sets have equal bytes.

    Args:
        tokenizer: of the windows; raybert's own where it is not given.
    """
    used = tokenizers.own_or(tokenizer)
    content = {
        "format": manifest.FORMAT,
        **manifest.describe(used.name, used.vocabulary),
        "seq_len": seq_len,
        "unit_rows": unit_rows,
        "settings": dict(settings),
        "inputs": dict(inputs),
        "counts": dict(counts),
        "splits": {split: [asdict(shard) for shard in splits.get(split, ())] for split in SPLITS},
    }
    storage.write_json(storage.join(uri, MANIFEST), content)
    return open_shards(uri)


def open_shards(uri: str, manifest_hash: str = "") -> ShardSet:
    """Read the manifest of a shard set.

    Args:
        manifest_hash: hash of the manifest that it must have, if known.

    Raises:
        InputError: there is no manifest, it has another version, or it belongs to another set.
    """
    path = storage.join(uri, MANIFEST)
    try:
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        storage.require_bucket(uri)
        raise InputError(
            f"{uri} is not a shard set: it has no {MANIFEST}. Create one with `raybert prepare --output {uri}`, "
            "or run it again if it was interrupted."
        ) from error
    found, its_hash = manifest.parse(data, path), hashlib.sha256(data).hexdigest()
    if manifest_hash not in ("", its_hash):
        raise InputError(
            f"{uri} no longer contains the shards that this run started with; restore them, or start a new run "
            "with another run.name."
        )
    return ShardSet(
        uri=storage.absolute(uri),
        seq_len=found.seq_len,
        unit_rows=found.unit_rows,
        vocabulary=found.vocabulary(),
        tokenizer_name=found.tokenizer.name,
        manifest_hash=its_hash,
        splits={
            split: tuple(Shard(**entry.model_dump()) for entry in getattr(found.splits, split)) for split in SPLITS
        },
        counts=found.counts,
        settings=found.settings,
        inputs=found.inputs,
    )


def verify_shards(shard_set: ShardSet, *, sizes_only: bool = False) -> None:
    """Check every shard against the manifest: its size, and unless ``sizes_only`` its SHA-256, columns and rows.

    Raises:
        InputError: naming the first shard that is missing or differs; or the set's tokenizer cannot be read.
    """
    for shard in (shard for split in SPLITS for shard in shard_set.shards(split)):
        uri = storage.join(shard_set.uri, shard.name)
        try:
            size = storage.size(uri)
        except FileNotFoundError as error:
            raise InputError(f"The shard {uri} is missing; prepare the data again.") from error
        if size != shard.bytes:
            raise InputError(f"The shard {uri} has {size} bytes instead of {shard.bytes}; prepare the data again.")
        if not sizes_only:
            with storage.open_uri(uri) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            if digest != shard.sha256:
                raise InputError(f"The shard {uri} is corrupt (its SHA-256 differs); prepare the data again.")
            if (rows := _footer(uri).num_rows) != shard.rows:
                raise InputError(
                    f"The shard {uri} has {rows} rows, but its manifest says {shard.rows}; prepare the data again."
                )
    shard_set.kept_tokenizer()  # raises where its files are damaged or gone


def read_unit(uri: str, unit: Unit, vocabulary: Vocabulary) -> UnitRows:
    """The windows of one unit of the shard set at ``uri``: one range request, and one for the footer of a new shard.

    Raises:
        InputError: the bytes there are no windows of text tokens; the shard was damaged since it was verified.
    """
    path = storage.join(uri, unit.shard)
    footer = _footer(path)
    group = footer.row_group(unit.row_group)
    columns = [group.column(i) for i in range(group.num_columns)]
    start = min(column.data_page_offset for column in columns)
    stop = max(column.data_page_offset + column.total_compressed_size for column in columns)
    data = storage.read_range(path, start, stop)
    try:
        # Pages carry a checksum.
        with pq.ParquetFile(
            _Range(data, start), metadata=footer, pre_buffer=False, page_checksum_verification=True
        ) as file:
            rows = rows_of(file.read_row_group(unit.row_group, use_threads=False), vocabulary)
    except (OSError, pa.ArrowException, ValueError, IndexError, OverflowError) as error:
        raise InputError(
            f"Row group {unit.row_group} of {path} is damaged ({error}); prepare the data again."
        ) from error
    _check_rows(rows, unit, path, vocabulary)
    return rows


def _check_rows(rows: UnitRows, unit: Unit, path: str, vocabulary: Vocabulary) -> None:
    where = f"Row group {unit.row_group} of {path}"
    if len(rows) != unit.rows:
        raise InputError(f"{where} has {len(rows)} rows, but its manifest says {unit.rows}; prepare the data again.")
    stop = vocabulary.text_stop
    if len(rows.tokens) and int(rows.tokens.max()) >= stop:
        raise InputError(
            f"{where} contains the token id {int(rows.tokens.max())}, but the ids of text are below {stop}; "
            "prepare the data again."
        )
    # Where text can have every id below its largest, as in raybert's own vocabulary, nothing more can be wrong.
    if not vocabulary.is_text[:stop].all() and not (known := vocabulary.is_text[rows.tokens]).all():
        raise InputError(
            f"{where} contains the token id {int(rows.tokens[~known][0])}, a special token, which text never "
            "contains; prepare the data again."
        )
    lengths, sentences = np.diff(rows.token_offsets), np.diff(rows.end_offsets)
    if len(rows) and (lengths.min() < 1 or sentences.min() < 1):
        raise InputError(f"{where} contains an empty window; prepare the data again.")
    inner = np.ones(max(0, len(rows.ends) - 1), bool)
    inner[rows.end_offsets[1:-1] - 1] = False  # from the last sentence of a window to the first of the next
    rising = np.diff(rows.ends.astype(np.int64)) > 0
    if not rising[inner].all() or not np.array_equal(rows.ends[rows.end_offsets[1:] - 1], lengths):
        raise InputError(f"{where} contains sentence ends that do not match its tokens; prepare the data again.")


def rows_of(table: pa.Table, vocabulary: Vocabulary) -> UnitRows:
    """A table with the columns of SCHEMA as flat arrays."""
    tokens, token_offsets = _flat(table["tokens"], vocabulary.dtype)
    ends, end_offsets = _flat(table["ends"], np.dtype(np.uint16))
    return UnitRows(tokens, token_offsets, ends, end_offsets, table["doc"].to_numpy())


@functools.lru_cache(maxsize=256)
def _footer(path: str) -> pq.FileMetaData:
    try:
        with storage.open_uri(path) as file:
            footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the storage; Arrow's own have no number
        raise InputError(f"{path} is not a Parquet file ({error}); it may be truncated or damaged.") from error
    columns = {footer.schema.column(i).path: footer.schema.column(i).physical_type for i in range(footer.num_columns)}
    if columns != COLUMNS:
        raise InputError(f"{path} is not a shard of `raybert prepare`: it has the columns {columns}.")
    return footer


class _Range(io.RawIOBase):
    """Bytes ``start`` and on of a larger file, for a reader that asks for nothing else."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._start, self._position = memoryview(data), start, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._start + len(self._data)}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        first = self._position - self._start
        part = self._data[first : first + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def _flat(column: pa.ChunkedArray, kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """A binary column as its values and the offsets of its rows, without a Python object per row."""
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    _, offset_buffer, data = array.buffers()
    places = np.frombuffer(offset_buffer, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    offsets = places // kind.itemsize
    values = np.frombuffer(data, kind.newbyteorder("<"))[offsets[0] : offsets[-1]]
    return values, offsets - offsets[0]
