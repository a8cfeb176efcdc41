"""What the rest needs to know of a tokenizer: the ids of its specials, which ids text can have, its size."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

NARROW = 65_535  # ids of a vocabulary of at most so many tokens are uint16, those of a larger one uint32


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer, as batches are made of them. Two are equal when their tokenizers' hashes are.

    Attributes:
        size: ids are below it; the rows of a model's embedding table, at least.
        drawn: ranges (first, stop) of the ids that random replacement may draw: no special, no unused slot.
        word_starts: bool (size,): the token begins a word; only where whole words are masked.
    """

    hash: str
    size: int = field(compare=False)
    cls: int = field(compare=False)
    sep: int = field(compare=False)
    mask: int = field(compare=False)
    pad: int = field(compare=False)
    unk: int | None = field(compare=False)
    drawn: tuple[tuple[int, int], ...] = field(compare=False, repr=False)
    word_starts: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def dtype(self) -> np.dtype:
        """Of ids in shards and batches; little endian where they are stored."""
        return np.dtype(np.uint16 if self.size <= NARROW else np.uint32)

    @property
    def specials(self) -> tuple[int, int, int, int]:
        """The ids that text never has."""
        return self.cls, self.sep, self.mask, self.pad

    @functools.cached_property
    def random_ids(self) -> np.ndarray:
        """The ids that random replacement may draw, ascending."""
        return np.concatenate([np.arange(first, stop) for first, stop in self.drawn]).astype(self.dtype)

    @functools.cached_property
    def is_text(self) -> np.ndarray:
        """bool (size,): the ids that text can have."""
        found = np.ones(self.size, bool)
        found[list(self.specials)] = False
        return found

    @functools.cached_property
    def text_stop(self) -> int:
        """One more than the largest id that text can have."""
        return int(np.flatnonzero(self.is_text)[-1]) + 1


class TextTokenizer(ABC):
    """Text to ids and back. Text is always plain text: a special token written out in it is never taken for one.

    Attributes:
        name: what a person calls it.
        hash: identity of what it makes of text: equal hashes give equal ids.
        size: ids are below it.
        roles: the ids of cls, sep, mask, pad and unk, as far as it has them.
    """

    name: str
    hash: str
    size: int
    roles: dict[str, int]

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """
        Raises:
            InputError: a model cannot be trained with it: it lacks a special token, or its ids have holes.
        """

    @property
    @abstractmethod
    def word_starts(self) -> np.ndarray:
        """bool (size,): the tokens that begin a word, and those of one that stand for themselves."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without specials around it."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of each text."""

    @abstractmethod
    def encode_sentences(self, text: str, ends: list[int]) -> tuple[np.ndarray, list[int]]:
        """A text whose sentences end at these characters: its ids (N,), and how many of them each sentence ends at.

        The counts rise: a sentence that has no token of its own is left out. The last one is N.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; specials show as their names.

        Raises:
            ValueError: an id is not in the vocabulary.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write its files into a local directory, which is made; `raybert.tokenizer.load` reads them."""
