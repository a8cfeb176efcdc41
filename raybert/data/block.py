"""A block of samples as compact columns: built, shipped as Arrow, and widened where they are used."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from raybert.data import masking, pairs
from raybert.data.spec import SampleSpec
from raybert.data.units import UnitRows

if TYPE_CHECKING:
    import pyarrow as pa

Columns = dict[str, np.ndarray]

# name: (type, whether it has a second dimension). About 3 bytes a token in all, against 18 when widened. Ids are of the
# type of their vocabulary: uint16, or uint32 where it has more than 65,535 tokens.
LAYOUT: Mapping[str, tuple[str, bool]] = {
    "input_ids": ("id", True),  # (N, T)
    "cut": ("int32", False),  # (N,) tokens before segment B
    "length": ("int32", False),  # (N,) tokens without padding
    "masked_positions": ("int32", True),  # (N, P), -1 = none
    "masked_labels": ("id", True),  # (N, P), [PAD] where there is none
    "next_sentence_label": ("int8", False),  # (N,) 0 = IsNext, 1 = NotNext
    "index": ("int64", False),  # (N,) the sample's place in the run
    "document": ("int64", False),  # (N,) the hash of the window's document
}


# Samples that are laid out and masked together, by length: as wide as the longest of them, and no wider. With 64 the
# calls of numpy for each group cost more than their padding would.
GROUP = 128


def empty(count: int, seq_len: int, spec: SampleSpec) -> Columns:
    """Columns of so many samples for `build` to fill, those of T and of P places full of padding."""
    most = masking.max_masked(seq_len, spec.masked.most)
    vocabulary = spec.vocabulary
    wide = {
        "input_ids": (seq_len, vocabulary.pad),
        "masked_positions": (most, -1),
        "masked_labels": (most, vocabulary.pad),
    }
    types = {name: vocabulary.dtype if kind == "id" else np.dtype(kind) for name, (kind, _) in LAYOUT.items()}
    return {
        name: np.full((count, wide[name][0]), wide[name][1], kind) if name in wide else np.empty(count, kind)
        for name, kind in types.items()
    }


def build(
    unit: UnitRows, rows: np.ndarray, keys: np.ndarray, index: np.ndarray, into: Columns, spec: SampleSpec
) -> None:
    """Pair and mask windows of one unit, into N rows (a view) of fresh columns from `empty`.

    `rows`, `keys` and `index` are (N,); a sample depends on its own key alone.
    """
    segments = pairs.draw_segments(unit, rows, keys, partners=spec.next_sentence)
    into["next_sentence_label"][:] = not_next = pairs.draw_labels(segments, keys)
    into["cut"][:], into["length"][:] = cut, length = pairs.layout(segments)
    into["index"][:], into["document"][:] = index, unit.doc[rows]
    fractions = spec.masked.at(index)
    order = np.argsort(length)
    for group in (order[first : first + GROUP] for first in range(0, len(order), GROUP)):
        width = int(length[group[-1]])
        ids = pairs.assemble(unit, segments.take(group), not_next[group], width, spec.vocabulary)
        masked, positions, labels = masking.mask(
            ids, cut[group], length[group], keys[group], fractions[group], spec.vocabulary
        )
        into["input_ids"][group, :width] = masked
        into["masked_positions"][group, : positions.shape[1]] = positions
        into["masked_labels"][group, : labels.shape[1]] = labels


def take(columns: Columns, rows: np.ndarray | slice) -> Columns:
    return {name: values[rows] for name, values in columns.items()}


def to_table(columns: Columns) -> "pa.Table":
    """Arrow columns over the same memory; two-dimensional ones as fixed-size binary."""
    import pyarrow as pa  # here, so that blocks are built where there is no Arrow

    arrays = []
    for column in columns.values():
        values = np.ascontiguousarray(column)
        if values.ndim == 2:
            kind = pa.binary(values.shape[1] * values.itemsize)
            arrays.append(pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values)]))
        else:
            arrays.append(pa.array(values))
    return pa.table(arrays, names=list(columns))


def from_table(table: "pa.Table") -> Columns:
    """Undo `to_table`, without a copy where the table is in one piece."""
    import pyarrow as pa

    columns = {}
    # There are as many labels as positions, which are int32.
    widths = [table.schema.field(name).type.byte_width for name in ("masked_labels", "masked_positions")]
    ids = "uint32" if widths[0] == widths[1] else "uint16"
    for name, (described, wide) in LAYOUT.items():
        kind = ids if described == "id" else described
        column = table.column(name)
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks)
        if not wide:
            columns[name] = array.to_numpy(zero_copy_only=False).astype(kind, copy=False)
            continue
        width = array.type.byte_width
        raw = np.frombuffer(array.buffers()[1], np.uint8, count=len(array) * width, offset=array.offset * width)
        columns[name] = raw.view(kind).reshape(len(array), -1)
    return columns


def widen(columns: Columns) -> Columns:
    """The arrays as a model takes them: int64 ids, types, positions (-1 = none) and labels (-100 = none), bool mask."""
    ids = columns["input_ids"].astype(np.int64)
    place = np.arange(ids.shape[1])
    positions = columns["masked_positions"].astype(np.int64)
    real = place < columns["length"][:, None]
    return {
        "input_ids": ids,
        "token_type_ids": ((place >= columns["cut"][:, None]) & real).astype(np.int64),
        "attention_mask": real,
        "masked_positions": positions,
        "masked_labels": np.where(positions >= 0, columns["masked_labels"].astype(np.int64), -100),
        "next_sentence_label": columns["next_sentence_label"].astype(np.int64),
        "index": columns["index"],
    }
