"""What a training sample is, beside its seed: how many of its tokens are masked, and what stands for a pair."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from raybert.tokenizer import GPT2, Vocabulary

if TYPE_CHECKING:
    from raybert.config import Config

MASKED_FRACTION = 0.15  # https://arxiv.org/abs/1810.04805, section 3.1


@dataclass(frozen=True)
class MaskedFraction:
    """The fraction of a sample's text tokens that are predicted: from `first` straight to `last`, which it keeps.

    A sample's fraction follows from its index alone, so it is the same wherever, and in whatever batch, it is built.
    """

    first: float = MASKED_FRACTION
    last: float = MASKED_FRACTION
    samples: int = 1  # the index at which `last` is reached

    def at(self, index: np.ndarray | int) -> np.ndarray:
        """(N,) sample indices -> (N,) float64."""
        way = np.minimum(np.asarray(index) / self.samples, 1.0)
        return self.first + (self.last - self.first) * way

    @property
    def most(self) -> float:
        return max(self.first, self.last)

    @property
    def mean(self) -> float:
        """Over a run's samples."""
        return (self.first + self.last) / 2

    def ended(self) -> "MaskedFraction":
        """The last one for all samples: validation is the same throughout a run."""
        return MaskedFraction(self.last, self.last)


@dataclass(frozen=True)
class SampleSpec:
    """How windows become samples, and samples become tensors."""

    next_sentence: bool = True  # half of the samples get another document's text as segment B; else a window is whole
    masked: MaskedFraction = field(default_factory=MaskedFraction)
    halves: bool = False  # segments A and B are sequences of their own: [CLS] A [SEP] and [CLS] B [SEP]
    bag_tokens: int = 0  # words that a sequence's vector has to predict
    bag_of_neighbour: bool = False  # ... of the other half's text instead of its own
    whole_word: bool = False  # all tokens of a word are predicted, or none
    seed: int = 0  # of the draw of these words
    vocabulary: Vocabulary = GPT2  # a reader puts its shards' in its place


ORIGINAL = SampleSpec()


def sample_spec(config: "Config", vocabulary: Vocabulary) -> SampleSpec:
    """What the objective of a run asks of its samples, with the ids of its shards."""
    given, train = config.objective, config.train
    last = given.mlm_rate if given.mlm_rate_end is None else given.mlm_rate_end
    return SampleSpec(
        next_sentence=given.pair == "next_sentence",
        masked=MaskedFraction(given.mlm_rate, last, samples=max(1, train.steps - 1) * train.global_batch),
        halves=given.pair == "contrastive",
        bag_tokens=given.bag_tokens if given.bag_weight else 0,
        bag_of_neighbour=given.bag_of == "neighbour",
        whole_word=given.whole_word,
        seed=config.data.seed,
        vocabulary=vocabulary,
    )
