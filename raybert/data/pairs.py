"""Sentence pairs for next-sentence prediction, from the windows of one unit.

A window is cut at a sentence end into A | B. With p = 1/2 the sample is A and B (IsNext), else A and the end of a
window of another document (NotNext). [CLS] A [SEP] B [SEP] never exceeds T, since a window has at most T - 3 tokens.

Lengths must not give the answer away. In the original recipe a true pair fills the sequence and a false one is cut, or
the other way round, and a model learns that before it learns language. Here every sample draws a partner whatever its
label, B' being the tail of the partner's window that comes nearest to B in length, and B and B' are both cut to the
shorter of the two. So (|A|, |B|) is the same for both labels of a sample, and whether B ends with a sentence says
nothing either, as B' is the longer one as often as the shorter.
"""

from dataclasses import dataclass, fields

import numpy as np

from raybert.data.rng import below, bits
from raybert.data.units import UnitRows
from raybert.tokenizer import Vocabulary

_CUT, _PARTNER, _LABEL = 10, 11, 12
# Draws of a partner before a sample whose B every partner repeats is made IsNext.
_TRIES = 4


@dataclass(frozen=True)
class Segments:
    """Where the parts of N samples lie in the unit's tokens; all fields are (N,) int64, `paired` is boolean."""

    a_start: np.ndarray
    a_length: np.ndarray
    b_start: np.ndarray
    other_start: np.ndarray  # of B', which replaces B in a NotNext sample
    b_length: np.ndarray  # of B and of B'
    paired: np.ndarray  # false where no partner exists, so that the sample must be IsNext

    def take(self, samples: np.ndarray) -> "Segments":
        return Segments(*(getattr(self, part.name)[samples] for part in fields(self)))


def draw_segments(unit: UnitRows, rows: np.ndarray, keys: np.ndarray, *, partners: bool = True) -> Segments:
    """Cut the windows `rows` (N,) and find each a partner, by its key (N,).

    Without partners every sample is IsNext, and B is all that is left of the window.

    Raises:
        ValueError: a window has fewer than two tokens.
    """
    lengths = np.diff(unit.token_offsets)
    if len(rows) and lengths[rows].min() < 2:
        raise ValueError("a window of fewer than 2 tokens cannot be cut into a pair")
    starts = unit.token_offsets[:-1]
    cut = _draw_cut(unit, rows, lengths, keys)
    b_length = lengths[rows] - cut
    other_start = np.zeros(len(rows), np.int64)
    other_length = b_length.copy()
    paired = np.zeros(len(rows), bool)
    open_rows = np.arange(len(rows)) if partners and len(unit) > 1 else np.empty(0, np.int64)
    partner_bits = bits(keys, _PARTNER, _TRIES)
    for attempt in range(_TRIES):
        if not len(open_rows):
            break
        partner = _draw_partner(unit, rows[open_rows], partner_bits[open_rows, attempt])
        begin = _nearest_tail(unit, partner, b_length[open_rows])
        other_start[open_rows] = begin
        other_length[open_rows] = starts[partner] + lengths[partner] - begin
        shared = np.minimum(b_length, other_length)[open_rows]
        own = (starts[rows] + cut)[open_rows]
        differs = _differ(unit.tokens, own, begin, shared)
        paired[open_rows] = differs
        open_rows = open_rows[~differs]
    b_length = np.where(paired, np.minimum(b_length, other_length), b_length)
    return Segments(starts[rows], cut, starts[rows] + cut, other_start, b_length, paired)


def draw_labels(segments: Segments, keys: np.ndarray) -> np.ndarray:
    """(N,) boolean: true = NotNext, with p = 1/2 where a partner exists."""
    return (bits(keys, _LABEL, 1)[:, 0] >> np.uint64(63)).astype(bool) & segments.paired


def layout(segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """cut (N,): tokens before segment B, |A| + 2; length (N,): tokens without padding."""
    cut = segments.a_length + 2
    return cut, cut + segments.b_length + 1


def assemble(
    unit: UnitRows, segments: Segments, not_next: np.ndarray, seq_len: int, vocabulary: Vocabulary
) -> np.ndarray:
    """Lay out [CLS] A [SEP] B [SEP] [PAD]... as ids (N, T) of the unit's type."""
    place = np.arange(seq_len)  # (T,)
    a_end = segments.a_length + 1  # place of the first [SEP]
    b_end = a_end + 1 + segments.b_length  # place of the second
    b_start = np.where(not_next, segments.other_start, segments.b_start)
    shift = np.where(place < a_end[:, None], (segments.a_start - 1)[:, None], (b_start - a_end - 1)[:, None])
    ids = np.take(unit.tokens, shift + place, mode="clip")  # (N, T)
    samples = np.arange(len(ids))
    ids[:, 0] = vocabulary.cls
    ids[samples, a_end] = vocabulary.sep
    ids[samples, b_end] = vocabulary.sep
    ids[place > b_end[:, None]] = vocabulary.pad
    return ids


def _draw_cut(unit: UnitRows, rows: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """|A|: one of the window's inner sentence ends, or in a window of one sentence any place between two tokens."""
    drawn = bits(keys, _CUT, 1)[:, 0]
    first = unit.end_offsets[rows]
    inner = unit.end_offsets[rows + 1] - first - 1
    by_sentence = unit.ends[first + below(drawn, np.maximum(inner, 1))].astype(np.int64)
    by_token = 1 + below(drawn, lengths[rows] - 1)
    return np.where(inner > 0, by_sentence, by_token)


def _draw_partner(unit: UnitRows, rows: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """A row of another document, uniformly; of the same document, but another row, where the unit has no other."""
    order = np.argsort(unit.doc, kind="stable")
    documents = unit.doc[order]
    group_start = np.searchsorted(documents, unit.doc[rows], side="left")
    group_size = np.searchsorted(documents, unit.doc[rows], side="right") - group_start
    others = len(unit) - group_size
    pick = below(drawn, np.maximum(others, 1))
    foreign = order[np.where(pick < group_start, pick, pick + group_size) % len(unit)]
    sibling = below(drawn, len(unit) - 1)
    sibling = sibling + (sibling >= rows)
    return np.where(others > 0, foreign, sibling)


def _nearest_tail(unit: UnitRows, partner: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Where in the unit's tokens the tail of each partner's window begins that is nearest to `length` tokens."""
    counts = np.diff(unit.end_offsets)
    first_sentence = np.cumsum(counts) - counts  # index of each window's first sentence among all of the unit
    # Every sentence's first token: the window's, or where the sentence before it ends.
    begins = np.empty(len(unit.ends), np.int64)
    window = np.repeat(unit.token_offsets[:-1], counts)
    begins[1:] = unit.ends[:-1]
    begins[first_sentence] = 0
    begins += window
    end = unit.token_offsets[partner + 1]
    ideal = np.maximum(end - length, unit.token_offsets[partner])
    left = np.searchsorted(begins, ideal, side="right") - 1
    right = np.minimum(left + 1, first_sentence[partner] + counts[partner] - 1)
    return np.where(begins[right] - ideal < ideal - begins[left], begins[right], begins[left])


def _differ(tokens: np.ndarray, a: np.ndarray, b: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Whether the runs of `length` tokens from `a` and from `b` differ anywhere."""
    differs = tokens[a] != tokens[b]
    for index in np.flatnonzero(~differs):
        n = length[index]
        differs[index] = not np.array_equal(tokens[a[index] : a[index] + n], tokens[b[index] : b[index] + n])
    return differs
