"""Tokens per second of steps on short documents in long rows; beside it the same number of tokens as full windows.

The documents have the lengths of AG News texts (about 55 tokens with [CLS] and [SEP]) and are padded to T=512. Both
sides are the compact model and train on about 2,048 real tokens a step; the limit is the side without padding.
"""

import numpy as np
import pyarrow.parquet as pq

from benchmarks.common import DATA, clock, medians, result
from raybert.bench import Stepper, default_device, random_columns, stepper
from raybert.data.block import Columns
from raybert.model.precision import pick_dtype
from raybert.tokenizer import Tokenizer
from raybert.train.memory import tune_memory

B, T = 4, 512


def micro_batches(tokens: int) -> list[Columns]:
    """Micro-batches of B padded samples, with real lengths in the order of the file, up to `tokens` in all."""
    texts = pq.read_table(DATA / "ag_news" / "ag_news_train.parquet", columns=["text"])["text"].to_pylist()[:400]
    lengths = np.array([min(len(ids) + 3, T) for ids in Tokenizer().encode_batch(texts)], np.int32)
    count = int(np.searchsorted(np.cumsum(lengths), tokens)) // B * B
    parts = []
    for first in range(0, count, B):
        part = random_columns(B, T)
        length = lengths[first : first + B]
        # A fifteenth in a hundred of each text, spread evenly; the rest of the row holds no position.
        positions = (np.arange(part["masked_positions"].shape[1]) / 0.15).astype(np.int32) + 1
        positions = np.where(positions < length[:, None] - 1, positions, -1)
        parts.append(part | {"length": length, "masked_positions": positions})
    return parts


def main() -> None:
    tune_memory()
    parts = micro_batches(B * T)
    tokens = sum(int(part["length"].sum()) for part in parts)
    first, second = medians(Stepper("compact", parts, clock=clock), stepper("compact", B, T, clock=clock), rounds=5)
    extra = {"documents": B * len(parts), "tokens": tokens, "padded_to": T}
    result("padding", first, second, second, "real tokens/s", dtype=str(pick_dtype("auto", default_device())), **extra)


if __name__ == "__main__":
    main()
