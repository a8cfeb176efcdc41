"""Zstandard files to their end: `zstandard` takes the place where a file was cut off for its end.

A file is a sequence of frames (RFC 8878, section 3.1). Their structure is followed while they are decompressed, and the
file may end only where a frame does.
"""

import io
from collections.abc import Generator
from typing import IO, Any, cast

import zstandard

LONGEST_WINDOW = 1 << 31  # what `zstd --long=31` writes
_FRAME, _SKIPPABLE = 0xFD2FB528, 0x184D2A50  # what they begin with; the last four bits of a skippable one are free
_RLE = 1  # kind of a block: one byte, to be repeated


def open_zst(file: IO[bytes]) -> io.BufferedReader:
    """The content of all frames of a file, in bounded memory.

    Raises:
        EOFError: while it is read: the file ends inside a frame.
        zstandard.ZstdError: while it is read: a frame is damaged.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW)
    reader = decompressor.stream_reader(cast(Any, _Followed(file)), read_across_frames=True)
    return io.BufferedReader(reader, 1 << 20)


class _Followed:
    """A file whose frames are followed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._frames = file, _frames()
        self._skip, self._take, self._may_end = next(self._frames)
        self._header = b""

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if not data and not (self._may_end and self._skip == len(self._header) == 0):
            raise EOFError("it ends inside a Zstandard frame")
        at = 0
        while at < len(data):
            skipped = min(self._skip, len(data) - at)
            taken = data[at + skipped : at + skipped + self._take - len(self._header)]
            at += skipped + len(taken)
            self._skip -= skipped
            self._header += taken
            if len(self._header) == self._take:
                self._skip, self._take, self._may_end = self._frames.send(self._header)
                self._header = b""
        return data


def _frames() -> Generator[tuple[int, int, bool], bytes, None]:
    """Asks for its next bytes: how many to skip, how many to send it, and whether the file may end before them."""
    skip = 0
    while True:
        magic = int.from_bytes((yield skip, 4, True), "little")
        if magic & ~0xF == _SKIPPABLE:
            skip = int.from_bytes((yield 0, 4, False), "little")
            continue
        if magic != _FRAME:  # the decompressor will say so
            yield 1 << 62, 1, False
        descriptor = (yield 0, 1, False)[0]
        single_segment, has_checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
        content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
        dictionary = (0, 1, 2, 4)[descriptor & 3]
        skip, last = (1 - single_segment) + dictionary + content_size, 0
        while not last:
            block = int.from_bytes((yield skip, 3, False), "little")
            last, kind, size = block & 1, block >> 1 & 3, block >> 3
            skip = 1 if kind == _RLE else size
        skip += 4 * has_checksum
