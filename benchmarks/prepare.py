"""Tokens per second of `prepare` on real text; beside it `datasets.map` with two processes and the same tokenizer.

The peer tokenises and cuts into runs of 512 as transformers' run_mlm.py does, from the same Parquet files; it knows no
sentences, documents' ends, hashes or shards. The limit is the tokenizer alone with a thread for every core.

With `--tokenizer WHERE` another vocabulary, which the peer opens as transformers' fast tokenizer; `all-MiniLM-L6-v2` is
that of an installed package. `threads` are then tokens per second of the library `tokenizers` in one process on all
cores, `tasks` of as many Ray tasks of one thread, which is what `prepare` has. Ray's processes are nice: on a busy
machine set RAY_worker_niceness=0.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import pyarrow.parquet as pq
import ray

from benchmarks.common import DATA, MINILM, clock, elsewhere, medians, minilm, result, seconds
from raybert import cluster
from raybert.data.text.prepare import prepare
from raybert.tokenizer import TextTokenizer, Tokenizer, load
from raybert.tokenizer.fast import FastTokenizer

SEQ_LEN, PROCESSES = 512, 2


def corpus() -> list[str]:
    return sorted(str(path) for path in (DATA / "corpus").glob("*.parquet"))


def _tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"input_ids": Tokenizer().encode_batch(batch["text"], num_threads=1)}


def _tokenize_fast(batch: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
    return {"input_ids": tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]}


def _group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """run_mlm.py's group_texts: join, drop the rest, cut."""
    joined = list(chain(*batch["input_ids"]))
    return {"input_ids": [joined[at : at + SEQ_LEN] for at in range(0, len(joined) // SEQ_LEN * SEQ_LEN, SEQ_LEN)]}


def peer_side(paths: list[str], total: int, where: str) -> Callable[[], float]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core's
    tokenize: Callable[..., Any] = _tokenize
    if where != Tokenizer.name:
        from transformers import AutoTokenizer

        tokenize = partial(_tokenize_fast, tokenizer=AutoTokenizer.from_pretrained(where))

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            table: Any = load_dataset("parquet", data_files=paths, split="train", cache_dir=folder)
            options = {"batched": True, "num_proc": PROCESSES, "load_from_cache_file": False}
            tokens = table.map(tokenize, remove_columns=table.column_names, **options)
            tokens.map(_group, **options)

    return lambda: total / seconds(work)


def in_tasks(tokenizer: TextTokenizer, texts: list[str], total: int, tasks: int) -> float:
    """Tokens per second of processes with one thread each that share the texts, sent and begun before the clock is."""
    encode = ray.remote(num_cpus=1)(lambda own, part: sum(map(len, own.encode_batch(part))))
    parts, own = [ray.put(texts[index::tasks]) for index in range(tasks)], ray.put(tokenizer)
    ray.get([encode.remote(own, texts[:10]) for _ in range(tasks)])
    return total / seconds(lambda: ray.get([encode.remote(own, part) for part in parts]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", default=Tokenizer.name, metavar="WHERE", help="as prepare --tokenizer takes it")
    parser.add_argument("--files", type=int, help="of the corpus; all of them")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    paths = corpus()[: arguments.files]
    where = minilm() if arguments.tokenizer == MINILM else arguments.tokenizer
    cluster.connect()
    texts = [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
    tokenizer, cores = load(where), os.cpu_count() or 1
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
            return total / seconds(lambda: prepare(paths, f"{folder}/shards", seq_len=SEQ_LEN, tokenizer=tokenizer))

    with elsewhere(partial(peer_side, paths, total, where)) as (peer,):
        first, second = medians(ours, peer, rounds=arguments.rounds)
    limit = max(before, alone())
    extra: dict[str, Any] = {"tokens": total, "documents": len(texts), "per_core": first / cores}
    if isinstance(tokenizer, FastTokenizer):
        extra |= {"tokenizer": arguments.tokenizer, "threads": limit, "tasks": in_tasks(tokenizer, texts, total, cores)}
    result("prepare", first, second, limit, "tokens/s", **extra)


if __name__ == "__main__":
    main()
