"""Comma-separated files, read as the text that stands in them: no value changes its type, no row its width."""

import csv
import io
from collections.abc import Iterator
from typing import IO

from raybert.data.text.values import ENCODING, UNDECODABLE, is_unicode, refusal
from raybert.errors import InputError

MOST_CHARACTERS = 1 << 26  # of a value: a quote that is never closed would take in the rest of the file


def records(file: IO[bytes], name: str) -> Iterator[tuple[int, list[str]]]:
    """The records of an open file with the numbers of the lines where they begin, from 1. The first is the header.

    A quoted value may hold commas, line ends and doubled quotes. Blank lines are skipped.

    Args:
        name: what the sentences call the file.

    Raises:
        InputError: the file is empty or not UTF-8, a quote is not closed, or a record has more or fewer values than the
            header.
    """
    csv.field_size_limit(MOST_CHARACTERS)
    # What is not UTF-8 becomes half a surrogate pair, so that the line can be named.
    reader = csv.reader(io.TextIOWrapper(file, ENCODING, "surrogateescape", newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise InputError(
                f"Line {line} of {name} is not csv ({error}); close every quote, and double the quotes inside a "
                "quoted value."
            ) from error
        if not values:
            continue
        if not all(map(is_unicode, values)):
            raise refusal(UNDECODABLE, f"Line {line} of {name}")
        header = header or values
        if len(values) != len(header):
            raise InputError(
                f"Line {line} of {name} has {len(values)} values, but the header has {len(header)}; quote values "
                "that contain a comma."
            )
        yield line, values
    if header is None:
        raise InputError(f"{name} is empty; its first line must name the columns.")
