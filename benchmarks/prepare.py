"""Tokens per second of `prepare` on real text; beside it the same documents through tiktoken alone, in one process.

The limit is tiktoken with a thread for every core and nothing else to do: no reading, no windows, no shards.
"""

import os
import tempfile

import pyarrow.parquet as pq

from benchmarks.common import DATA, alternate, result, seconds
from raybert import cluster
from raybert.data.prepare import prepare
from raybert.tokenizer import Tokenizer


def main() -> None:
    inputs = sorted(str(path) for path in (DATA / "corpus").glob("*.parquet"))
    cluster.connect()
    texts = [text for path in inputs for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
    tokenizer = Tokenizer()
    total = sum(map(len, tokenizer.encode_batch(texts, num_threads=os.cpu_count() or 1)))

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return total / seconds(lambda: prepare(inputs, f"{folder}/shards", seq_len=512))

    def peer() -> float:
        return total / seconds(lambda: tokenizer.encode_batch(texts, num_threads=os.cpu_count() or 1))

    first, limit = alternate(ours, peer, rounds=3)
    result("prepare", first, limit, limit, "tokens/s", tokens=total, documents=len(texts))


if __name__ == "__main__":
    main()
