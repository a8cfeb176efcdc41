"""Documents to windows: runs of whole consecutive sentences, each of which becomes one training sample per epoch."""

import bisect
import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from raybert.data.text import sentences
from raybert.tokenizer import TextTokenizer

SPECIALS = 3  # [CLS] A [SEP] B [SEP]
MIN_TOKENS = 8  # a shorter window teaches nothing and costs a whole row


class Window(NamedTuple):
    """Tokens ``start`` to ``ends[-1]`` of a document; ``ends`` are where its sentences end, in the document."""

    start: int
    ends: list[int]


@dataclass(frozen=True)
class Document:
    """An encoded document. ``tokens`` (N,) uint16 or uint32; ``doc`` is the int64 hash of the normalised text."""

    doc: int
    tokens: np.ndarray
    windows: list[Window]
    short: list[Window]  # dropped: under MIN_TOKENS


def encode_document(text: str, tokenizer: TextTokenizer, seq_len: int) -> Document | None:
    """Normalise, split, encode and cut one document; None when nothing but white space is in it.

    Raises:
        UnicodeEncodeError: the text holds half a surrogate pair.
    """
    whole, character_ends = sentences.find_ends(text)
    if not character_ends:
        return None
    content = whole.encode()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    tokens, ends = tokenizer.encode_sentences(whole, character_ends)
    if not len(tokens):  # nothing that the vocabulary knows: control characters, say
        return None
    windows, short = cut_windows(ends, seq_len)
    return Document(int.from_bytes(digest, "little", signed=True), tokens, windows, short)


def cut_windows(ends: list[int], seq_len: int) -> tuple[list[Window], list[Window]]:
    """Pack sentences that end at ``ends`` (increasing token counts) into windows of at most ``seq_len - 3`` tokens.

    A sentence longer than half a window is cut into equal pieces first, so that a window which is not the last of its
    document holds at least two and can be divided into segments A and B.

    Returns:
        the windows, and those dropped because they have fewer than MIN_TOKENS tokens; together, in order, all tokens.
    """
    room = seq_len - SPECIALS
    ends = cut_long(ends, room // 2)
    windows: list[Window] = []
    short: list[Window] = []
    first, start = 0, 0
    while first < len(ends):
        stop = bisect.bisect_right(ends, start + room, first)
        window = Window(start, ends[first:stop])
        (windows if window.ends[-1] - start >= MIN_TOKENS else short).append(window)
        first, start = stop, window.ends[-1]
    return windows, short


def cut_long(ends: list[int], limit: int) -> list[int]:
    """Add ends inside each sentence of more than ``limit`` tokens, so that it falls into pieces of about one length."""
    lengths = [end - start for start, end in pairwise([0, *ends])]
    if max(lengths, default=0) <= limit:
        return ends
    result: list[int] = []
    for end, length in zip(ends, lengths, strict=True):
        pieces = -(-length // limit)
        result += [end - length + length * piece // pieces for piece in range(1, pieces + 1)]
    return result
