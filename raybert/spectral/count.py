"""How often tokens stand near each other: sparse rows of exact counts, from windows of shards. No Ray here.

A pair is two tokens of one window at most `reach` places apart, counted from either side: the row is the one token, the
column the other, which only the most frequent tokens have. Windows are pieces of documents, so pairs that a window's
end cuts apart are lost: an eighth of them at 128 tokens a window and a reach of 32.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from raybert.data.units import UnitRows
from raybert.tokenizer import Vocabulary

GAP = 65_535  # between windows, where no text token can be; of a vocabulary with wider ids its size
# Occurrences that are counted at once: their neighbours and the rows that they are counted into stay in a core's cache.
OCCURRENCES = 1 << 13
GROUP_ROWS = 16


@dataclass(frozen=True)
class Counts:
    """Sparse rows: row i has ``values[starts[i]:starts[i + 1]]`` in the ``columns`` of the same places, rising."""

    starts: np.ndarray  # int64 (rows + 1,)
    columns: np.ndarray  # uint16
    values: np.ndarray  # uint32

    def __len__(self) -> int:
        return len(self.starts) - 1


def gap_of(vocabulary: Vocabulary) -> int:
    """What lies between windows of this vocabulary."""
    return max(GAP, vocabulary.size)


def lay_out(units: Iterable[UnitRows], reach: int, vocabulary: Vocabulary) -> np.ndarray:
    """The tokens of all windows, one after the other, with `reach` gaps before, between and behind them."""
    gap, kind = gap_of(vocabulary), vocabulary.dtype
    parts = []
    for unit in units:
        lengths = np.diff(unit.token_offsets)
        room = np.full(len(unit.tokens) + reach * len(unit), gap, kind)
        room[np.arange(len(unit.tokens)) + reach * np.repeat(np.arange(1, len(unit) + 1), lengths)] = unit.tokens
        parts.append(room)
    return np.concatenate([*parts, np.full(reach, gap, kind)])


def frequencies(stream: np.ndarray, tokens: int) -> np.ndarray:
    """int64 (tokens,): occurrences of each text token in a laid-out stream."""
    return np.bincount(stream, minlength=tokens)[:tokens]


def pick_columns(frequency: np.ndarray, most: int) -> np.ndarray:
    """The most frequent tokens that occur at all, the most frequent first and of equal ones the lower id."""
    order = np.argsort(-frequency, kind="stable")[:most]
    return order[frequency[order] > 0]


def share_rows(frequency: np.ndarray, parts: int) -> list[tuple[int, int]]:
    """At most so many ranges of tokens, with about the same number of occurrences each; together all tokens."""
    total = np.cumsum(frequency)
    inner = np.searchsorted(total, total[-1] * np.arange(1, parts) / parts)
    edges = sorted({0, *inner.tolist(), len(frequency)})
    return list(pairwise(edges))


def count(stream: np.ndarray, chosen: np.ndarray, first: int, stop: int, reach: int) -> Counts:
    """The rows of the tokens `first` to `stop`.

    Occurrences are sorted by token, and the neighbours of one token after another are counted: a row of counts stays in
    the cache, which is several times as fast as counting pair by pair all over the matrix.

    Args:
        stream: from `lay_out`, with the same reach; it begins with a gap.
        chosen: (C,) the tokens of the columns.
    """
    size = len(chosen)
    column_of = np.full(int(stream[0]) + 1, size, np.uint16)  # one more column, for tokens that have none and for gaps
    column_of[chosen] = np.arange(size)
    columns = column_of[stream]
    (places,) = np.nonzero((stream >= first) & (stream < stop))
    by_row = np.argsort(stream[places], kind="stable")  # uint16 numpy sorts by radix
    places = places[by_row] - reach
    rows = stream[places + reach].astype(np.int64) - first
    neighbours = np.lib.stride_tricks.sliding_window_view(columns, 2 * reach + 1)

    occurrences = np.bincount(rows, minlength=stop - first)
    ends = np.cumsum(occurrences)
    width = size + 1
    lengths, wide, values = [], [], []
    for low, high in _groups(occurrences):
        dense = np.zeros(0, np.int64)
        begin, end = ends[low] - occurrences[low], ends[high - 1]
        for start in range(begin, max(end, begin + 1), OCCURRENCES):
            part = slice(start, min(start + OCCURRENCES, end))
            codes = neighbours[places[part]].astype(np.int64)
            codes += ((rows[part] - low) * width)[:, None]
            counted = np.bincount(codes.ravel(), minlength=(high - low) * width)
            dense = dense + counted if len(dense) else counted
        by_token = dense.reshape(high - low, width)
        by_token[np.arange(high - low), column_of[first + low : first + high]] -= occurrences[low:high]  # with itself
        by_token[:, size] = 0
        (kept,) = np.nonzero(dense)
        lengths.append(np.diff(np.searchsorted(kept, np.arange(high - low + 1) * width)))
        wide.append((kept - np.repeat(np.arange(high - low) * width, lengths[-1])).astype(np.uint16))
        values.append(dense[kept].astype(np.uint32))
    starts = np.append(0, np.cumsum(np.concatenate(lengths)))
    return Counts(starts, np.concatenate(wide), np.concatenate(values))


def _groups(occurrences: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of rows that are counted together: few of them, and few occurrences where there is more than one."""
    weight = np.maximum(occurrences, OCCURRENCES // GROUP_ROWS)
    edges = np.flatnonzero(np.diff(np.cumsum(weight) // OCCURRENCES)) + 1
    bounds = [0, *edges.tolist(), len(occurrences)]
    return list(pairwise(bounds))
