"""A seeded sample of raw text, read in this process: what a tokenizer is learned from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from raybert.data.rng import fold, uniform
from raybert.data.text import corpus
from raybert.data.text.documents import documents
from raybert.data.text.inputs import Passed
from raybert.data.text.values import Bad
from raybert.errors import InputError

TOKEN_BYTES = 4.0  # of text, about, by which tokens are counted before there is a tokenizer
UNSEEN, UNSEEN_DOCUMENTS = 0.05, 500  # share of the documents that are kept to measure on, and the most of them
_ORDER, _UNSEEN = 40, 41  # purposes of draws


@dataclass
class Sample:
    """Fragments of the input, in a seeded order, of about as many tokens as were asked for.

    `unseen` holds the documents that `texts` left out when it was gone through.
    """

    fragments: list[list[corpus.Piece]]
    passed_over: list[Passed]
    text_column: str
    split_txt: str
    seed: int
    unseen: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for fragment in self.fragments for piece in fragment)

    def texts(self, advance: Callable[[int], object] = lambda size: None) -> Iterator[str]:
        """The documents, but for those that are kept unseen; ones that cannot be used are left out.

        Args:
            advance: told the bytes of each piece of input that was read.

        Raises:
            InputError: a file is damaged, or none holds a document with a text.
        """
        number, self.unseen = 0, []
        for piece in (piece for fragment in self.fragments for piece in fragment):
            for text in documents(piece, self.text_column, self.split_txt):
                if isinstance(text, Bad) or not text.strip():
                    continue
                number += 1
                if len(self.unseen) < UNSEEN_DOCUMENTS and self._is_unseen(number):
                    self.unseen.append(text)
                else:
                    yield text
            advance(piece.size)
        if not number:
            raise InputError("The input contains no documents with text.")

    def _is_unseen(self, number: int) -> bool:
        return bool(uniform(fold(self.seed, _UNSEEN, np.array([number])))[0] < UNSEEN)


def draw(inputs: Sequence[str], text_column: str, split_txt: str, *, tokens: int, seed: int) -> Sample:
    """Choose fragments of the input, as `prepare` reads it, until they hold so many tokens.

    Raises:
        InputError: an input is missing, empty or of no known kind.
    """
    raw = corpus.plan(inputs, text_column, lines=bool(split_txt))
    score = uniform(fold(seed, _ORDER, np.arange(len(raw.fragments))))
    chosen, size = [], 0.0
    for index in np.argsort(score, kind="stable"):
        if size >= tokens * TOKEN_BYTES:
            break
        chosen.append(raw.fragments[index])
        size += sum(piece.size for piece in raw.fragments[index])
    return Sample(chosen, raw.passed_over, text_column, split_txt, seed)
