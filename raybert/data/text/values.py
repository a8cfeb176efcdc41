"""From what a file holds to text: the one place that decides what is a text, and says why something is not.

`prepare` counts the reasons in its manifest; `embed` and probes, which need every row, refuse with the sentence.
"""

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raybert.errors import InputError

ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that Excel puts first
TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())


@dataclass(frozen=True)
class Bad:
    """A document that cannot be used, and why: the reason under which the manifest counts it."""

    reason: str
    fault: str = field(default="", compare=False)  # the reason in words; the subject stands before it


UNDECODABLE = Bad("undecodable", "is not UTF-8")
HALF_PAIR = Bad("undecodable", "contains a lone surrogate (\\ud800 to \\udfff), which is not valid Unicode")
NOT_JSON = Bad("not_json", "is not JSON")
MISSING = Bad("missing", "is missing")  # null, or a line without the key
WRONG_TYPE = Bad("wrong_type", "is not a JSON object")
EMPTY = Bad("empty", "is empty")
TOO_LARGE = Bad("too_large", "is too large")
_JSON_TYPES = {bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}


def decode(data: bytes, most: int | None = None) -> str | Bad:
    """Bytes as UTF-8; more than `most` of them are too large."""
    if most is not None and len(data) > most:
        return TOO_LARGE
    try:
        return data.decode(ENCODING)
    except UnicodeDecodeError:
        return UNDECODABLE


def text_of(value: Any) -> str | Bad:
    """The text that a value of a text column holds. Bytes are UTF-8; a number is not text."""
    if isinstance(value, str):
        return value if is_unicode(value) else HALF_PAIR
    if isinstance(value, bytes):
        return decode(value)
    if value is None:
        return MISSING
    shown = textwrap.shorten(str(value), 40)
    kind = _JSON_TYPES.get(type(value), type(value).__name__)
    return Bad(WRONG_TYPE.reason, f"contains a {kind} ({shown}) instead of text")


def refusal(bad: Bad, place: str, column: str = "") -> InputError:
    """The sentence for a row that cannot be used; `place` is such as "Line 3 of FILE"."""
    subject = f"{place}: column {column}" if column else place
    return InputError(f"{subject} {bad.fault}; correct it or remove the row.")


def is_unicode(text: str) -> bool:
    """False for a string with half a surrogate pair, which JSON can spell and no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_objects(lines: Iterable[bytes], most: int | None = None) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    """The objects of JSON lines of at most so many bytes, with their lines' numbers, from 1; not of blank lines."""
    for number, line in enumerate(lines, start=1):
        if not line.isspace():
            yield number, _json_object(line, most)


def _json_object(line: bytes, most: int | None) -> dict[str, Any] | Bad:
    text = decode(line, most)
    if isinstance(text, Bad):
        return text
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Bad(NOT_JSON.reason, f"{NOT_JSON.fault} ({error})")
    return row if isinstance(row, dict) else WRONG_TYPE


def column_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of an Arrow column; texts as bytes, since Arrow does not check that they are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.type in TEXT_TYPES:
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def require_columns(place: str, wanted: Sequence[str], names: Sequence[str], how: str = "with --text-column") -> None:
    """
    Args:
        how: the way to name another column, for the sentence.

    Raises:
        InputError: a wanted column is not among the names, or is there more than once.
    """
    for name in wanted:
        if name not in names:
            raise InputError(f"{place} has no column {name}; choose one of {', '.join(names)} {how}.")
        refuse_twins(place, names, [name])


def refuse_twins(place: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """
    Raises:
        InputError: a wanted name stands there more than once.
    """
    for name in wanted:
        if names.count(name) > 1:
            raise InputError(f"{place} has {names.count(name)} columns named {name!r}; rename all but one.")
