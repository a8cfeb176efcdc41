"""The two segments of a sample as sequences of their own: what a contrast of neighbouring texts compares."""

import numpy as np

from raybert.data.block import Columns
from raybert.tokenizer import Vocabulary


def split(columns: Columns, vocabulary: Vocabulary) -> Columns:
    """N samples [CLS] A [SEP] B [SEP] -> 2N rows: [CLS] A [SEP] in the even ones, [CLS] B [SEP] in the odd ones.

    Each keeps the predictions that lie in it, so nothing but B's own [CLS] is added to a step's work. `cut` is the
    length, as no row has a second segment.
    """
    cut, length = columns["cut"], columns["length"]
    lengths = np.stack([cut, length - cut + 1], axis=1).reshape(-1)  # (2N,)
    rows = {name: np.repeat(values, 2, axis=0) for name, values in columns.items()}
    ids = rows["input_ids"]  # (2N, T)
    place = np.arange(ids.shape[1])
    # Place p of B is place p + cut - 1 of the sample, but for its own [CLS].
    shifted = np.minimum(place + (cut - 1)[:, None], ids.shape[1] - 1)
    ids[1::2] = np.take_along_axis(columns["input_ids"], shifted, axis=1)
    ids[:, 0] = vocabulary.cls
    ids[place >= lengths[:, None]] = vocabulary.pad
    positions = rows["masked_positions"]  # (2N, P)
    in_b = columns["masked_positions"] >= cut[:, None]
    positions[0::2][in_b] = -1
    positions[1::2] = np.where(in_b, columns["masked_positions"] - cut[:, None] + 1, -1)
    return rows | {"cut": lengths, "length": lengths}
