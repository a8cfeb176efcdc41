"""Tokens per second and core that the Ray stream hands to a consumer: plan, read, pair, mask, batch.

Beside it transformers' DataCollatorForLanguageModeling over a `datasets` table of the same windows, in one process. The
limit is the same plan, read and built in this process with numpy, as many samples at a time, with no Ray.
"""

import os
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.common import DATA, medians, result
from raybert import cluster
from raybert.bench import stream_rate
from raybert.data.reader import SampleReader
from raybert.data.shards import ShardSet, read_unit
from raybert.data.stream import MOST_SAMPLES
from raybert.data.text.prepare import prepare

BATCH, STEPS, T = 64, 6144, 512
# The peer is slow: fewer batches give the same rate.
PEER_STEPS = 20


def collator_side(shards: ShardSet) -> Callable[[], float]:
    """transformers' way from stored token ids to masked batches of tensors."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling

    from raybert.model.interop import fast_tokenizer

    rows = [read_unit(shards.uri, unit, shards.vocabulary) for unit in shards.units()[:4]]
    windows = [part for unit in rows for part in np.split(unit.tokens, unit.token_offsets[1:-1])]
    stored = Dataset.from_dict({"input_ids": [window.astype(np.int32) for window in windows[: BATCH * PEER_STEPS]]})
    collate = DataCollatorForLanguageModeling(fast_tokenizer(T), mlm_probability=0.15)

    def side() -> float:
        start, tokens = time.perf_counter(), 0
        for first in range(0, len(stored) - BATCH + 1, BATCH):
            batch = collate([{"input_ids": ids} for ids in stored[first : first + BATCH]["input_ids"]])
            tokens += int(batch["attention_mask"].sum())
        return tokens / (time.perf_counter() - start)

    return side


def main() -> None:
    cores = os.cpu_count() or 1
    cluster.connect()
    with tempfile.TemporaryDirectory() as folder:
        inputs = [str(DATA / "corpus" / "research-00000-of-00002.parquet")]
        shards = prepare(inputs, f"{folder}/shards", seq_len=T)

        def ours() -> float:
            return stream_rate(shards.uri, batch=BATCH, steps=STEPS) / cores

        def bare() -> float:
            reader = SampleReader(shards, seed=0)
            start = time.perf_counter()
            end = BATCH * STEPS // 6
            chapters = (np.arange(first, first + MOST_SAMPLES) for first in range(0, end, MOST_SAMPLES))
            tokens = sum(int(reader.build(chapter)["length"].sum()) for chapter in chapters)
            return tokens / (time.perf_counter() - start)

        first, second, limit = medians(ours, collator_side(shards), bare, rounds=3)
    result("stream", first, second, limit, "tokens/s per core", batch=BATCH, seq_len=T, cores=cores)


if __name__ == "__main__":
    main()
