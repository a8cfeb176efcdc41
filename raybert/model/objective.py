"""What the encoder is trained to do: the losses by name, and their weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Every loss there is, as the log names it, and what a person is told.
TITLES: Mapping[str, str] = {
    "mlm": "masked words",
    "nsp": "next sentence",
    "contrast": "contrast",
    "bag": "words of the text",
}
# The losses of each kind of pair.
PAIR_LOSSES: Mapping[str, tuple[str, ...]] = {"next_sentence": ("nsp",), "contrastive": ("contrast",), "none": ()}
VECTORS: Mapping[str, tuple[str, ...]] = {"pooler": ("pooler",), "mean": ("mean",), "both": ("pooler", "mean")}


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses: masked words, pairs, and words that a sequence's one vector predicts.

    By default the original's: masked words and next sentences, each with weight 1.

    Attributes:
        pair: "next_sentence", "contrastive" or "none".
        vectors: of a sequence, for contrast and bag: "pooler", "mean" (over its tokens) or "both", of whose losses the
            mean is taken.
        temperature: by which the contrast's cosines are divided.
    """

    pair: str = "next_sentence"
    mlm_weight: float = 1.0
    pair_weight: float = 1.0
    bag_weight: float = 0.0
    vectors: str = "both"
    temperature: float = 0.05

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses that are on, in the order of the model's sums."""
        return ("mlm", *PAIR_LOSSES[self.pair], *(("bag",) if self.bag_weight else ()))

    @property
    def weights(self) -> dict[str, float]:
        given = {"mlm": self.mlm_weight, "nsp": self.pair_weight, "contrast": self.pair_weight, "bag": self.bag_weight}
        return {name: given[name] for name in self.losses}

    @property
    def pooled(self) -> tuple[str, ...]:
        return VECTORS[self.vectors]

    def loss_by_chance(self, vocab_size: int, micro_batch: int) -> float:
        """The loss (nats) of a model that knows nothing, which is about where training starts."""
        one = {
            "mlm": math.log(vocab_size),
            "nsp": math.log(2),
            "contrast": math.log(max(2, micro_batch)),
            "bag": math.log(vocab_size),
        }
        return sum(weight * one[name] for name, weight in self.weights.items())


ORIGINAL = Objective()
