"""Choosing and masking tokens for the masked-language-model loss (https://arxiv.org/abs/1810.04805, section 3.1)."""

import numpy as np

from raybert.data.rng import below, bits, draw, extend, fold, uniform
from raybert.data.spec import MASKED_FRACTION
from raybert.tokenizer import Vocabulary

_CHOOSE, _TREAT, _REPLACE = 20, 21, 22


def max_masked(seq_len: int, fraction: float = MASKED_FRACTION) -> int:
    """P: the most positions that a sample of T tokens can have masked; three of them are special."""
    return max(1, round(fraction * (seq_len - 3)))


def mask(
    ids: np.ndarray,
    cut: np.ndarray,
    length: np.ndarray,
    keys: np.ndarray,
    fraction: float | np.ndarray,
    vocabulary: Vocabulary,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask round(fraction n) of each sample's n text tokens (one at least), chosen uniformly without replacement.

    Of the chosen, 80 % become [MASK], 10 % an id drawn uniformly from those that the vocabulary allows, 10 % stay.
    Special tokens and padding are never chosen. A sample's result depends on its own key alone.

    Where the vocabulary knows its word starts, whole words are chosen in a uniformly drawn order, and one that has more
    tokens than are left to choose is skipped, so that fewer than round(fraction n) may be masked
    (https://github.com/google-research/bert, create_pretraining_data.py). A sample without a word that short, as in
    scripts without spaces, has tokens chosen instead. What becomes of a token is drawn for each on its own.

    Args:
        ids: (N, T) as `raybert.data.pairs.assemble` lays them out, with cut and length (N,). A sample's result does not
            depend on T, but for the padding.
        keys: (N,) uint64.
        fraction: of all samples, or (N,). Tokens that are masked with one are masked with a larger one too, unless
            whole words are chosen.

    Returns:
        masked ids (N, T); positions (N, P) int32 ascending, then -1; labels (N, P) of the ids' type, then [PAD].
    """
    seq_len = ids.shape[1]
    most = max_masked(seq_len, float(np.max(fraction)))
    # [CLS] and two [SEP] are no text. numpy rounds halves to even, as Python's round does.
    wanted = np.clip(np.rint(fraction * (length - 3)).astype(np.int64), 1, most)
    if vocabulary.word_starts is None:
        chosen = _choose(cut, length, keys, wanted, seq_len)
    else:
        chosen = _choose_words(cut, length, keys, wanted, vocabulary.word_starts[ids])
        wanted = np.bincount(chosen // seq_len, minlength=len(ids))
    rows = np.repeat(np.arange(len(ids)), wanted)
    places = chosen - rows * seq_len
    original = ids.ravel()[chosen]
    # Drawn by (sample, position), so that they do not depend on the order of the positions.
    place_keys = fold(extend(fold(keys)[rows], places))
    treat = uniform(draw(place_keys, _TREAT, 1)[:, 0])
    replaced = np.flatnonzero((treat >= 0.8) & (treat < 0.9))
    treated = np.where(treat < 0.8, vocabulary.dtype.type(vocabulary.mask), original)
    random_ids = vocabulary.random_ids
    treated[replaced] = random_ids[below(draw(place_keys[replaced], _REPLACE, 1)[:, 0], len(random_ids))]
    masked = ids.copy()
    masked.ravel()[chosen] = treated
    filled = np.arange(most) < wanted[:, None]  # (N, P)
    positions = np.full(filled.shape, -1, np.int32)
    positions[filled] = places
    labels = np.full(filled.shape, vocabulary.pad, vocabulary.dtype)
    labels[filled] = original
    return masked, positions, labels


def _choose(cut: np.ndarray, length: np.ndarray, keys: np.ndarray, wanted: np.ndarray, seq_len: int) -> np.ndarray:
    """The `wanted` (N,) text tokens of each sample with the lowest scores, ascending, as places in the flat (N, T)."""
    samples, most = np.arange(len(keys)), int(wanted.max())
    score = bits(keys, _CHOOSE, seq_len)  # of which the last bit does not count
    high = (score >> np.uint64(33)).astype(np.uint32)  # sorted eight times as fast
    none = np.uint32(2**32 - 1)
    high[:, 0] = none
    high[samples, cut - 1] = none
    high[np.arange(seq_len) >= (length - 1)[:, None]] = none
    # In order, the lowest ones give each row the score up to which it takes.
    lowest = np.partition(high, most - 1, axis=1)[:, :most]
    lowest.sort(axis=1)
    chosen = high <= lowest[samples, wanted - 1][:, None]  # (N, T)
    # Where several have the last score that is taken, the lower bits decide.
    for row in np.flatnonzero(chosen.sum(1) > wanted):
        order = np.lexsort((score[row] >> np.uint64(1), high[row]))
        chosen[row] = False
        chosen[row, order[: wanted[row]]] = True
    return np.flatnonzero(chosen)


def _choose_words(
    cut: np.ndarray, length: np.ndarray, keys: np.ndarray, wanted: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """Whole words of at most `wanted` (N,) text tokens in all of each sample, as places in the flat (N, T), ascending.

    Args:
        starts: (N, T) whether the token begins a word, wherever it stands.
    """
    place = np.arange(starts.shape[1])
    score = bits(keys, _CHOOSE, len(place)) >> np.uint64(1)  # a word's is that of its first token
    text = (place > 0) & (place != (cut - 1)[:, None]) & (place < (length - 1)[:, None])
    # A segment begins with a word, whatever its first token.
    first = text & (starts | (place == 1) | (place == cut[:, None]))
    words = np.flatnonzero(first)  # of all samples, in order
    of_token = np.cumsum(first) - 1  # the word that each place of text belongs to
    sizes = np.bincount(of_token[text.ravel()], minlength=len(words))
    rows = words // len(place)
    order = np.lexsort((score.ravel()[words], rows))
    begins = np.searchsorted(rows, np.arange(len(cut)))
    counts = np.diff(np.append(begins, len(words)))
    taken = np.zeros(len(words), bool)
    used = np.zeros(len(cut), np.int64)
    for rank in range(int(counts.max())):
        (open_rows,) = np.nonzero((used < wanted) & (rank < counts))
        if not len(open_rows):
            break
        word = order[begins[open_rows] + rank]
        fits = used[open_rows] + sizes[word] <= wanted[open_rows]
        taken[word[fits]] = True
        used[open_rows[fits]] += sizes[word[fits]]
    chosen = text & taken[of_token].reshape(text.shape)
    for row in np.flatnonzero(used == 0):
        (places,) = np.nonzero(text[row])
        chosen[row, places[np.argsort(score[row, places], kind="stable")[: wanted[row]]]] = True
    return np.flatnonzero(chosen)
