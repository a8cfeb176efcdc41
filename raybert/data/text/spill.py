"""The shuffle between reading text and writing shards, as plain functions: windows in, sorted slices, shards' rows out.

Each window gets a 64-bit key, a hash of its document and its place in it. A task that reads text sorts its windows by
key and writes them as one *spill*, cut into buckets of equal key ranges; a shard is a range of whole buckets, gathered
from every spill and sorted. So a shard's rows are a fair sample of the corpus, nothing depends on which task read what,
and no task holds more than a piece of the input or one shard.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raybert.data.rng import fold, uniform
from raybert.data.shards import SCHEMA, SPLITS, binary_column, rows_of
from raybert.data.text.windows import Document
from raybert.data.units import UnitRows
from raybert.tokenizer import Vocabulary

BUCKET_BITS = 10
BUCKETS = 1 << BUCKET_BITS  # of each split: the most shards that a split can have
SPILL_SCHEMA = SCHEMA.append(pa.field("key", pa.uint64())).append(pa.field("place", pa.uint32()))
_VALIDATION = 30  # purpose of a draw: which split a document belongs to


def window_keys(doc: np.ndarray, place: np.ndarray) -> np.ndarray:
    """uint64 keys of windows from their document's hash (int64) and their place in it."""
    return fold(doc.view(np.uint64), place)


def in_validation(doc: np.ndarray, fraction: float) -> np.ndarray:
    """True for the documents (int64 hashes) of the validation split, about ``fraction`` of them."""
    return uniform(fold(doc.view(np.uint64), _VALIDATION)) < fraction


class Spill(NamedTuple):
    """Windows as bytes: bucket b, of split ``SPLITS[b // BUCKETS]``, lies at ``offsets[b]:offsets[b + 1]``."""

    data: bytes
    offsets: np.ndarray  # int64 (len(SPLITS) * BUCKETS + 1,)
    tokens: np.ndarray  # int64 (len(SPLITS),): tokens of each split


@dataclass
class Collector:
    """Windows of several documents, until they are spilled."""

    tokens: list[np.ndarray] = field(default_factory=list)
    ends: list[np.ndarray] = field(default_factory=list)
    doc: list[int] = field(default_factory=list)
    place: list[int] = field(default_factory=list)
    size: int = 0  # tokens

    def add(self, document: Document) -> None:
        for place, window in enumerate(document.windows):
            self.tokens.append(document.tokens[window.start : window.ends[-1]])
            self.ends.append(np.array(window.ends) - window.start)
            self.doc.append(document.doc)
            self.place.append(place)
            self.size += window.ends[-1] - window.start

    def spill(self, validation_fraction: float) -> "Spill":
        """The windows ordered by split and key."""
        doc, place = np.array(self.doc, np.int64), np.array(self.place, np.uint32)
        key = window_keys(doc, place)
        split = in_validation(doc, validation_fraction).astype(np.int64)
        bucket = (key >> np.uint64(64 - BUCKET_BITS)).astype(np.int64) + BUCKETS * split
        order = np.lexsort((key, bucket))
        batch = pa.record_batch(
            [
                _concatenate(self.tokens, order),
                _concatenate(self.ends, order),
                pa.array(doc[order]),
                pa.array(key[order]),
                pa.array(place[order]),
            ],
            schema=SPILL_SCHEMA,
        )
        firsts = np.searchsorted(bucket[order], np.arange(len(SPLITS) * BUCKETS + 1))
        parts = [batch.slice(a, b - a).serialize() if b > a else b"" for a, b in pairwise(firsts)]
        tokens = np.bincount(split, [len(window) for window in self.tokens], minlength=len(SPLITS)).astype(np.int64)
        return Spill(b"".join(parts), np.cumsum([0, *map(len, parts)]), tokens)


def _concatenate(arrays: list[np.ndarray], order: np.ndarray) -> pa.Array:
    ordered = [arrays[i] for i in order]
    offsets = np.cumsum([0, *map(len, ordered)])
    return binary_column(np.concatenate(ordered) if ordered else np.zeros(0), offsets)


def merge(slices: Iterable[bytes], vocabulary: Vocabulary) -> tuple[UnitRows, int, int]:
    """Gather one shard: the same slice of every spill, sorted by key, exact copies of documents left out.

    All windows of all copies of a document have the same keys, so they meet here. Two documents that merely share a
    64-bit hash would be taken for copies: for a hundred million documents the chance is 1 in 4,000.

    Returns:
        the rows; the number of documents that begin here; the number of copies of documents that were left out.
    """
    batches = [batch for data in slices for batch in _batches(data)]
    table = pa.Table.from_batches(batches, SPILL_SCHEMA).combine_chunks()
    key, doc, place = (table[name].to_numpy() for name in ("key", "doc", "place"))
    order = np.lexsort((doc, key))
    key, doc, place = key[order], doc[order], place[order]
    copy = np.zeros(len(order), bool)
    copy[1:] = (key[1:] == key[:-1]) & (doc[1:] == doc[:-1])
    rows = rows_of(table.take(order[~copy]), vocabulary)
    return rows, int((place[~copy] == 0).sum()), int((place[copy] == 0).sum())


def _batches(data: bytes) -> Iterable[pa.RecordBatch]:
    reader = pa.BufferReader(data)
    while reader.tell() < len(data):
        yield pa.ipc.read_record_batch(pa.ipc.read_message(reader), SPILL_SCHEMA)


def shard_ranges(tokens: int, shard_tokens: int) -> list[tuple[int, int]]:
    """Bucket ranges of a split's shards, a power of two of them, so that each has at most about ``shard_tokens``.

    A split without tokens has no shards; with more than BUCKETS x shard_tokens the shards grow instead.
    """
    if tokens == 0:
        return []
    count = 1
    while count < BUCKETS and tokens > count * shard_tokens:
        count *= 2
    width = BUCKETS // count
    return [(i * width, (i + 1) * width) for i in range(count)]
