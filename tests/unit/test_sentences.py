"""Where sentences end, and that splitting loses nothing."""

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.data.text import sentences
from raybert.data.text.sentences import MOST_MARKS, normalise, split

TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from('.!?…。 \n"”)AaZz1')), max_size=200)


@given(TEXT)
def test_sentences_joined_are_the_normalised_text(text: str) -> None:
    assert "".join(split(text)) == " ".join(normalise(text))


@given(TEXT)
def test_splitting_the_joined_sentences_keeps_the_text(text: str) -> None:
    whole = "".join(split(text))
    assert "".join(split(whole)) == whole


@given(TEXT)
def test_no_sentence_is_empty_and_none_but_the_first_starts_without_reason(text: str) -> None:
    for i, sentence in enumerate(split(text)):
        assert sentence.strip()
        assert not sentence.endswith(" ")
        assert not (i == 0 and sentence.startswith(" "))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t\n ", []),
        ("One. Two! Three? Four", ["One.", " Two!", " Three?", " Four"]),
        ("He said “Go.” Then he went.", ["He said “Go.”", " Then he went."]),
        ('"Why?" she asked. (So it was.) And 3 left.', ['"Why?" she asked.', " (So it was.)", " And 3 left."]),
        ("Mr. Smith and Dr. J. R. Jones met at St. Paul.", ["Mr. Smith and Dr. J. R. Jones met at St. Paul."]),
        ("The U.S. Army, e.g. Rangers, came. It won.", ["The U.S. Army, e.g. Rangers, came.", " It won."]),
        ("See No. 5. I said No. Then I left.", ["See No. 5.", " I said No.", " Then I left."]),
        ("So did I. We left.", ["So did I.", " We left."]),
        ("It cost 3.50 dollars.", ["It cost 3.50 dollars."]),
        ("wrapped at\nsome width. Like\nthis.", ["wrapped at some width.", " Like this."]),
        ("A title\n\nThe text", ["A title", " The text"]),
        ("Il est là. Élan vital. élan", ["Il est là.", " Élan vital. élan"]),
        ("これは文。次の文！「引用。」終", ["これは文。", "次の文！", "「引用。」", "終"]),
        ("「はい。」\n\n「何！？」", ["「はい。」", " 「何！？」"]),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert split(text) == expected


def test_composed_and_decomposed_accents_are_one_text() -> None:
    assert split("e\u0301lan") == split("\u00e9lan")


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(UnicodeEncodeError):
        split("a \ud800 b")


def test_a_megabyte_without_a_space_is_one_pass() -> None:
    assert len(split("a." * 500_000)) == 1
    assert len(split("x. " * 300_000)) == 1


MARKS = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code))]
# Letters, marks that sort, marks that are two when decomposed, and what else is no letter.
PIECES = st.sampled_from(["a", "é", "ǟ", "≠", "가", "न", "─", "\u200d", "\u0301", "\u0316", "\u0344", "\u0f73", "⃝"])
ROWS = st.lists(st.tuples(PIECES, st.integers(1, 3 * MOST_MARKS)), max_size=12).map(
    lambda rows: "".join(piece * count for piece, count in rows)
)


def most_marks(text: str) -> int:
    most = row = 0
    for character in unicodedata.normalize("NFD", text):
        row = row + 1 if unicodedata.combining(character) else 0
        most = max(most, row)
    return most


def test_what_finds_rows_of_marks_knows_every_mark() -> None:
    assert all(sentences._ROW.fullmatch(mark * MOST_MARKS) for mark in MARKS)


@given(st.one_of(TEXT, ROWS, st.text(st.one_of(PIECES, st.sampled_from(MARKS)), max_size=MOST_MARKS)))
def test_the_normal_form_of_an_ordinary_text_is_unicode_s(text: str) -> None:
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    assert (" ".join(normalise(text)) == plain) or most_marks(text) > MOST_MARKS


@settings(max_examples=50)
@given(ROWS)
def test_rows_of_marks_stay_short_and_lose_nothing(text: str) -> None:
    found = " ".join(normalise(text))
    assert most_marks(found) <= MOST_MARKS + 2
    assert " ".join(normalise(found)) == found
    assert sorted(unicodedata.normalize("NFD", found.replace("\u034f", ""))) == sorted(
        unicodedata.normalize("NFD", text)
    )


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0f73", "\u05b0\u0591\u0301", "\u0344\u0316"])
def test_half_a_million_marks_are_one_pass(marks: str) -> None:
    """Whoever sorts them together needs many minutes."""
    assert len(split("a" + marks * (500_000 // len(marks)) + " b.")) == 1
