"""Choosing and masking tokens for the masked-language-model loss (https://arxiv.org/abs/1810.04805, section 3.1)."""

import numpy as np

from raybert.data.rng import below, bits, fold, uniform
from raybert.tokenizer import MASK_ID, NUM_TEXT_TOKENS, PAD_ID

MASKED_FRACTION = 0.15
_CHOOSE, _TREAT, _REPLACE = 20, 21, 22


def max_masked(seq_len: int) -> int:
    """P: the most positions that a sample of T tokens can have masked; three of them are special."""
    return max(1, round(MASKED_FRACTION * (seq_len - 3)))


def mask(
    ids: np.ndarray, cut: np.ndarray, length: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask round(0.15 n) of each sample's n text tokens (one at least), chosen uniformly without replacement.

    Of the chosen, 80 % become [MASK], 10 % a text token drawn uniformly from the whole vocabulary, 10 % stay. Special
    tokens and padding are never chosen. A sample's result depends on its own key alone.

    Args:
        ids: (N, T) uint16 as `raybert.data.pairs.assemble` lays them out, with cut and length (N,).
        keys: (N,) uint64.

    Returns:
        masked ids (N, T) uint16; positions (N, P) int32 ascending, then -1; labels (N, P) uint16, then [PAD].
    """
    samples, seq_len = ids.shape
    most = max_masked(seq_len)
    place = np.arange(seq_len)
    text = (place > 0) & (place != (cut - 1)[:, None]) & (place < (length - 1)[:, None])  # (N, T)
    # numpy rounds halves to even, as Python's round does.
    wanted = np.clip(np.rint(MASKED_FRACTION * text.sum(1)).astype(np.int64), 1, most)
    score = np.where(text, bits(keys, _CHOOSE, seq_len) >> np.uint64(1), np.uint64(2**64 - 1))
    lowest = np.argpartition(score, most - 1, axis=1)[:, :most]  # (N, P)
    by_score = np.take_along_axis(lowest, np.argsort(np.take_along_axis(score, lowest, 1), 1), 1)
    chosen = np.where(np.arange(most) < wanted[:, None], by_score, seq_len)
    chosen.sort(axis=1)
    valid = chosen < seq_len
    safe = np.where(valid, chosen, 0)
    original = np.take_along_axis(ids, safe, 1)
    # Drawn by (sample, position), so that they do not depend on the order of the positions.
    place_keys = fold(keys[:, None], safe).reshape(-1)
    treat = uniform(bits(place_keys, _TREAT, 1)).reshape(samples, most)
    random_ids = below(bits(place_keys, _REPLACE, 1), NUM_TEXT_TOKENS).reshape(samples, most)
    treated = np.where(treat < 0.8, MASK_ID, np.where(treat < 0.9, random_ids, original)).astype(ids.dtype)
    masked = ids.copy()
    rows = np.broadcast_to(np.arange(samples)[:, None], chosen.shape)
    masked[rows[valid], chosen[valid]] = treated[valid]
    positions = np.where(valid, chosen, -1).astype(np.int32)
    labels = np.where(valid, original, PAD_ID).astype(np.uint16)
    return masked, positions, labels
