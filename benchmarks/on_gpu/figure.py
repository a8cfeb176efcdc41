"""Curves as a PNG with numpy and zlib alone: a bare machine has no matplotlib."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 960, 560
LEFT, RIGHT, TOP, BOTTOM = 70, 250, 30, 50  # margins; the legend stands on the right
COLOURS = ("0072b2", "d55e00", "009e73", "b37a00", "b0578d", "1d2630")  # Okabe and Ito's palette
GRID, INK = "e3e7ec", "6b7683"
# 3 x 5 dots a character, a row a digit: 4, 2 and 1 are its dots from left to right.
CHARACTERS = "ABCDEFGHIKLMNOPRSTUVWXY0123456789.%,-"
DOTS = """
25755 65656 34443 65556 74647 74644 34553 55755 72227 55655 44447 57755 65555 25552 65644 65655 34216 72222 55557 55552
55775 55255 55222 75557 26227 71747 71717 55711 74717 74757 71111 75757 75717 00002 51245 00024 00700
"""
GLYPHS = dict(zip(CHARACTERS, DOTS.split(), strict=True))
DOT = 2  # pixels


def draw(lines: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, level: float | None = None) -> bytes:
    """A PNG of lines through points (x, y), with their names beside them.

    Args:
        level: of a grey line across.
    """
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    points = [point for line in lines.values() for point in line]
    x_ticks = _ticks([0.0, *(point[0] for point in points)])
    y_ticks = _ticks([point[1] for point in points] + ([level] if level is not None else []))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for tick in y_ticks:
        row = place((x_ticks[0], tick))[1]
        _line(image, (LEFT, row), (WIDTH - RIGHT, row), GRID, 1)
        _text(image, f"{tick:g}", LEFT - 45, round(row) - 5, INK)
    for tick in x_ticks:
        column = place((tick, y_ticks[0]))[0]
        _text(image, f"{tick:g}", round(column) - 10, HEIGHT - BOTTOM + 10, INK)
    _text(image, x, LEFT, HEIGHT - 20, INK)
    _text(image, y, LEFT, 8, INK)
    if level is not None:
        _line(image, place((x_ticks[0], level)), place((x_ticks[-1], level)), INK, 1)
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(point) for point in line]
        for start, end in pairwise(places):
            _line(image, start, end, colour, 2)
        for each in places:
            _line(image, (each[0] - 2, each[1]), (each[0] + 2, each[1]), colour, 5)
        row = TOP + 20 * number
        _line(image, (WIDTH - RIGHT + 15, row + 5), (WIDTH - RIGHT + 40, row + 5), colour, 3)
        _text(image, name, WIDTH - RIGHT + 48, row, INK)
    return _png(image)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the smallest to above the largest, four to nine of them."""
    low, high = min(values), max(values)
    span = max(high - low, 1e-9)
    step = 10.0 ** np.floor(np.log10(span))
    step = next(step * part for part in (1, 0.5, 0.25, 0.2, 0.1) if span / (step * part) >= 4)
    first, last = np.floor(low / step), np.ceil(high / step)
    return [float(step * number) for number in np.arange(first, max(last, first + 1) + 1)]


def _rgb(colour: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(colour), np.uint8)


def _line(image: np.ndarray, start: tuple[float, float], end: tuple[float, float], colour: str, width: int) -> None:
    count = int(max(abs(end[0] - start[0]), abs(end[1] - start[1]))) + 2
    columns = np.linspace(start[0], end[0], count).round().astype(int)
    rows = np.linspace(start[1], end[1], count).round().astype(int)
    for up in range(-(width // 2), width - width // 2):
        for along in range(-(width // 2), width - width // 2):
            image[np.clip(rows + up, 0, HEIGHT - 1), np.clip(columns + along, 0, WIDTH - 1)] = _rgb(colour)


def _text(image: np.ndarray, text: str, left: int, top: int, colour: str) -> None:
    """What has no glyph is a gap."""
    for number, character in enumerate(text.upper()):
        for row, bits in enumerate(GLYPHS.get(character, "00000")):
            for column in range(3):
                if int(bits) & (4 >> column):
                    y, x = top + DOT * row, left + DOT * (4 * number + column)
                    image[max(0, y) : y + DOT, max(0, x) : x + DOT] = _rgb(colour)


def _png(image: np.ndarray) -> bytes:
    """https://www.w3.org/TR/png-3/: a header, one stream of unfiltered rows, an end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.concatenate([np.zeros((len(image), 1), np.uint8), image.reshape(len(image), -1)], axis=1)
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
