"""Plain text to sentences, by rules alone: fast, and good enough for any language that ends its sentences with a mark.

A sentence ends at a blank line, or at ``. ! ? …`` (and ``। ؟``), closing quotes or brackets, and white space before
something that is not a lower-case letter; and at ``。！？``, one or several with closing quotes, which need no space.
A full stop after an initial ("J."), a dotted abbreviation ("e.g.") or a known one ("Dr.") ends nothing. A single line
break is white space: hard-wrapped text is as common as one paragraph a line.
"""

import functools
import re
import unicodedata
from itertools import pairwise

_PARAGRAPH = re.compile(r"\n\s*\n")
_SPACED = r"""[.!?…।؟][)\]"'”’»]*\ (?=[^\sa-z])"""
_UNSPACED = r"[。！？]++[」』”’）]*+(?=.)"
# The second one searches a text 2.7 times as fast; few texts need the first.
_CANDIDATE, _SPACED_CANDIDATE = re.compile(f"{_SPACED}|{_UNSPACED}"), re.compile(_SPACED)
_UNSPACED_MARKS = "。！？"
_OPENERS = "([\"'“‘«¿¡„"
_DOTTED = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # J   U.S   e.g
_TITLES = "mr mrs ms dr prof st sr jr rev hon gen col maj capt cmdr lt sgt sen rep gov pres messrs mme mlle"
_FIRMS = "inc ltd co corp bros dept univ assn mt ft ave blvd vs cf al viz"
_ABBREVIATIONS = frozenset(f"{_TITLES} {_FIRMS}".split())
# "No." alone is an answer; before a number it is an abbreviation.
_COUNTED = "no nos fig figs eq pp vol vols ch sec art ed jan feb mar apr jun jul aug sep sept oct nov dec"
_BEFORE_NUMBER = frozenset(_COUNTED.split())
_LONGEST = max(map(len, _ABBREVIATIONS | _BEFORE_NUMBER))
# Combining marks in a row. The time that a normal form takes grows with the square of their number, so no more of them
# are left together; UAX #15, section 13, allows 30, which some real texts have more of.
MOST_MARKS = 256
_JOINER = "\u034f"  # what UAX #15 puts between them: the combining grapheme joiner, which shows nothing
# No mark is a letter, a digit, white space or ASCII, so every row of them is in one of these. One may decompose to two.
_ROW = re.compile(rf"(?<![^\w\s\x00-\x7f])[^\w\s\x00-\x7f]{{{MOST_MARKS // 2},}}+")
# Searching takes as long as everything else here together, so it is done where one of every 16 characters looks so.
_STRIDE = 16
_STRIDES = re.compile(rf"[^\w\s\x00-\x7f]{{{MOST_MARKS // 2 // _STRIDE}}}")


def normalise(text: str) -> list[str]:
    """The paragraphs of a text: composed Unicode (NFC), single spaces, none empty.

    Raises:
        UnicodeEncodeError: the text holds half a surrogate pair, which is not a character.
    """
    text.encode()
    if not text.isascii() and _STRIDES.search(text[::_STRIDE]):
        text = _ROW.sub(_interrupted, text)
    parts = _PARAGRAPH.split(unicodedata.normalize("NFC", text))
    return [words for part in parts if (words := " ".join(part.split()))]


def _interrupted(row: re.Match[str]) -> str:
    """The characters with a joiner wherever more than MOST_MARKS marks would follow on one another."""
    parts, marks = [], 0
    for character in row[0]:
        begins_with_mark, more = _marks(character)
        if not begins_with_mark:
            marks = 0
        elif marks + more > MOST_MARKS:
            parts.append(_JOINER)
            marks = 0
        marks += more
        parts.append(character)
    return "".join(parts)


@functools.lru_cache(1 << 12)
def _marks(character: str) -> tuple[bool, int]:
    """Whether the decomposed character begins with a mark, and how many marks it has."""
    classes = [unicodedata.combining(part) for part in unicodedata.normalize("NFD", character)]
    return classes[0] > 0, sum(map(bool, classes))


def split(text: str) -> list[str]:
    """The sentences of a text, in order; all but the first begin with the space that follows the one before.

    Joined, they are the normalised text. An empty text has none.
    """
    whole, ends = find_ends(text)
    return [whole[start:end] for start, end in pairwise([0, *ends])]


def find_ends(text: str) -> tuple[str, list[int]]:
    """The normalised text, its paragraphs joined by spaces, and the increasing counts of characters at which its
    sentences end.
    """
    paragraphs = normalise(text)
    whole, ends, at = " ".join(paragraphs), set(), 0
    for paragraph in paragraphs:
        at += len(paragraph)
        ends.add(at)
        at += 1
    unspaced = not whole.isascii() and any(mark in whole for mark in _UNSPACED_MARKS)
    for match in (_CANDIDATE if unspaced else _SPACED_CANDIDATE).finditer(whole):
        end = match.end()
        if whole[end - 1] != " ":
            ends.add(end)
        elif end - 1 not in ends and _ends_sentence(whole, match.start(), end):
            ends.add(end - 1)  # the space belongs to what follows
    return whole, sorted(ends)


def _ends_sentence(text: str, mark: int, after: int) -> bool:
    following = text[after]
    if following in _OPENERS:
        following = text[after : after + 4].lstrip(_OPENERS)[:1]
    if following.islower():
        return False
    if text[mark] != ".":
        return True
    earliest = max(0, mark - 24)
    word = text[text.rfind(" ", earliest, mark) + 1 or earliest : mark]
    if len(word) > _LONGEST and word.isalpha():  # no abbreviation is as long; most words are, and need no more
        return True
    word = word.lstrip(_OPENERS)
    if word != "I" and _DOTTED.fullmatch(word):
        return False
    word = word.lower()
    return word not in _ABBREVIATIONS and not (word in _BEFORE_NUMBER and following.isdigit())
