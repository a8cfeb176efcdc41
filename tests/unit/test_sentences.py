"""Where sentences end, and that splitting loses nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.data.text.sentences import normalise, split

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
