"""Tokens per second of `prepare` on real text; beside it `datasets.map` with two processes and the same tokenizer.

The peer tokenises and cuts into runs of 512 as transformers' run_mlm.py does, from the same Parquet files; it knows no
sentences, documents' ends, hashes or shards. The limit is tiktoken alone with a thread for every core.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import pyarrow.parquet as pq

from benchmarks.common import DATA, clock, elsewhere, medians, result, seconds
from raybert import cluster
from raybert.data.text.prepare import prepare
from raybert.tokenizer import Tokenizer

SEQ_LEN, PROCESSES = 512, 2


def corpus() -> list[str]:
    return sorted(str(path) for path in (DATA / "corpus").glob("*.parquet"))


def _tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"input_ids": Tokenizer().encode_batch(batch["text"], num_threads=1)}


def _group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """run_mlm.py's group_texts: join, drop the rest, cut."""
    joined = list(chain(*batch["input_ids"]))
    return {"input_ids": [joined[at : at + SEQ_LEN] for at in range(0, len(joined) // SEQ_LEN * SEQ_LEN, SEQ_LEN)]}


def peer_side(paths: list[str], total: int) -> Callable[[], float]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            table: Any = load_dataset("parquet", data_files=paths, split="train", cache_dir=folder)
            options = {"batched": True, "num_proc": PROCESSES, "load_from_cache_file": False}
            tokens = table.map(_tokenize, remove_columns=table.column_names, **options)
            tokens.map(_group, **options)

    return lambda: total / seconds(work)


def main() -> None:
    paths = corpus()
    cluster.connect()
    texts = [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
    tokenizer, cores = Tokenizer(), os.cpu_count() or 1
    tokenizer.encode("")  # reads the vocabulary
    total = 0

    def alone() -> float:
        nonlocal total
        start = clock()
        total = sum(map(len, tokenizer.encode_batch(texts, num_threads=cores)))
        return total / (clock() - start)

    before = alone()

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return total / seconds(lambda: prepare(paths, f"{folder}/shards", seq_len=SEQ_LEN))

    with elsewhere(partial(peer_side, paths, total)) as (peer,):
        first, second = medians(ours, peer, rounds=3)
    limit = max(before, alone())
    extra = {"tokens": total, "documents": len(texts), "per_core": first / cores}
    result("prepare", first, second, limit, "tokens/s", **extra)


if __name__ == "__main__":
    main()
