"""The laws of windows: whole sentences, nothing lost, lengths within bounds."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raybert.data.text import sentences
from raybert.data.text.windows import MIN_TOKENS, SPECIALS, cut_long, cut_windows, encode_document
from raybert.tokenizer import Tokenizer

LENGTHS = st.lists(st.integers(1, 120), min_size=1, max_size=60)
SEQ_LEN = st.integers(16, 160)
WORDS = st.sampled_from(
    ["The", "cat", "sat.", "Über", "naïve", "ends!", "日本語。", "次", "“Quoted.”", "3.5", "\n\n", "x" * 90]
)
PROSE = st.lists(st.one_of(WORDS, st.text(max_size=6)), max_size=80).map(" ".join)


@given(LENGTHS, SEQ_LEN)
def test_windows_and_what_is_dropped_are_all_tokens_in_order(lengths: list[int], seq_len: int) -> None:
    ends = np.cumsum(lengths).tolist()
    windows, short = cut_windows(ends, seq_len)
    position = 0
    for window in sorted(windows + short):
        assert window.start == position
        position = window.ends[-1]
    assert position == ends[-1]


@given(LENGTHS, SEQ_LEN)
def test_windows_hold_whole_sentences_within_the_length(lengths: list[int], seq_len: int) -> None:
    room = seq_len - SPECIALS
    ends = np.cumsum(lengths).tolist()
    pieces = cut_long(ends, room // 2)
    windows, short = cut_windows(ends, seq_len)
    assert [end for window in sorted(windows + short) for end in window.ends] == pieces
    for window in windows:
        assert MIN_TOKENS <= window.ends[-1] - window.start <= room
        assert all(np.diff([window.start, *window.ends]) > 0)
    assert all(window.ends[-1] - window.start < MIN_TOKENS for window in short)


@given(LENGTHS, SEQ_LEN)
def test_a_window_ends_only_where_the_next_sentence_does_not_fit(lengths: list[int], seq_len: int) -> None:
    windows, short = cut_windows(np.cumsum(lengths).tolist(), seq_len)
    every = sorted(windows + short)
    for window, following in itertools.pairwise(every):
        assert following.ends[0] - window.start > seq_len - SPECIALS
        assert len(window.ends) >= 2  # so that segments A and B can be cut


@given(LENGTHS, st.integers(1, 50))
def test_long_sentences_are_cut_into_even_pieces(lengths: list[int], limit: int) -> None:
    ends = np.cumsum(lengths).tolist()
    pieces = cut_long(ends, limit)
    assert set(ends) <= set(pieces)
    assert np.diff(pieces, prepend=0).max() <= limit
    assert np.diff(pieces, prepend=0).min() >= min(min(lengths), (limit + 1) // 2)


@given(PROSE, st.sampled_from([16, 32, 64, 512]))
def test_the_windows_of_a_document_are_its_text(text: str, seq_len: int) -> None:
    tokenizer = Tokenizer()
    parts = sentences.split(text)
    document = encode_document(text, tokenizer, seq_len)
    if not parts:
        assert document is None
        return
    assert document is not None
    assert document.tokens.tolist() == tokenizer.encode("".join(parts))
    every = sorted(document.windows + document.short)
    assert [window.start for window in every] == [0, *(window.ends[-1] for window in every[:-1])]
    assert every[-1].ends[-1] == len(document.tokens)


def test_sentences_end_where_they_would_if_each_were_encoded_alone() -> None:
    text = "The first one is here. “And a second!” Über alles? 42 is it, e.g. this. The end (of it). Or not"
    tokenizer = Tokenizer()
    document = encode_document(text, tokenizer, 512)
    assert document is not None
    alone = [len(tokenizer.encode(part)) for part in sentences.split(text)]
    assert document.windows[0].ends == np.cumsum(alone).tolist()


def test_a_document_is_known_by_its_normalised_text() -> None:
    tokenizer = Tokenizer()
    documents = [encode_document(text, tokenizer, 64) for text in ("one  two\nthree", "one two three ", "one two four")]
    hashes = [document.doc for document in documents if document is not None]
    assert hashes[0] == hashes[1] != hashes[2]
