"""Words of a text that its one vector has to predict: a seeded draw among those that tell texts apart."""

import numpy as np

from raybert.data.block import Columns
from raybert.data.rng import draw, fold
from raybert.tokenizer import Vocabulary

_BAG = 30
# A token that more of a micro-batch's texts have than this says little about any one of them.
COMMON = 0.25


def originals(columns: Columns) -> np.ndarray:
    """(N, T) the ids as they were before some were masked."""
    ids = columns["input_ids"].astype(np.int64)
    rows, places = np.nonzero(columns["masked_positions"] >= 0)
    ids[rows, columns["masked_positions"][rows, places]] = columns["masked_labels"][rows, places]
    return ids


def draw_bags(columns: Columns, count: int, seed: int, vocabulary: Vocabulary) -> np.ndarray:
    """(N, count) different tokens of each text, -1 where it has fewer.

    A token counts as content when at most a quarter of these texts have it: that needs no list of words, and holds for
    any language. The draw depends on the seed, the sample's index and which half it is, and which tokens are content on
    the texts of this micro-batch; on nothing else.

    Args:
        columns: one micro-batch, before or after `raybert.data.halves.split`.
    """
    ids = originals(columns)
    rows, places = np.nonzero(vocabulary.is_text[ids] & (np.arange(ids.shape[1]) < columns["length"][:, None]))
    pairs = np.unique(rows * vocabulary.size + ids[rows, places])
    rows, tokens = pairs // vocabulary.size, pairs % vocabulary.size
    texts = np.bincount(tokens, minlength=vocabulary.size)
    content = texts[tokens] <= max(1.0, COMMON * len(ids))
    rows, tokens = rows[content], tokens[content]
    half = np.append(False, np.diff(columns["index"]) == 0)  # the second row of a sample
    score = draw(fold(seed, columns["index"][rows], half[rows], tokens), _BAG, 1)[:, 0]
    order = np.lexsort((score, rows))
    rows, tokens = rows[order], tokens[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    drawn = rank < count
    bags = np.full((len(ids), count), -1, np.int64)
    bags[rows[drawn], rank[drawn]] = tokens[drawn]
    return bags
