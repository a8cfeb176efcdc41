"""Shard sets made for a test: random windows with known tokens, without a tokenizer or Ray."""

from functools import partial

import numpy as np

from raybert.data.shards import ShardSet, open_shards, shard_name, write_manifest, write_shard
from raybert.data.units import UnitRows


def random_rows(rows: int, seq_len: int, *, documents: int, seed: int = 0, vocabulary: int = 50_257) -> UnitRows:
    """Windows of 8 to T - 3 tokens in sentences of 1 to 12, spread over documents."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, seq_len - 2, rows)
    tokens = rng.integers(0, vocabulary, lengths.sum()).astype(np.uint16)
    ends = []
    for length in lengths:
        cuts = np.cumsum(rng.integers(1, 13, length))
        ends.append(np.append(cuts[cuts < length], length).astype(np.uint16))
    return UnitRows(
        tokens=tokens,
        token_offsets=np.append(0, np.cumsum(lengths)).astype(np.int64),
        ends=np.concatenate(ends),
        end_offsets=np.append(0, np.cumsum([len(e) for e in ends])).astype(np.int64),
        doc=rng.integers(0, documents, rows).astype(np.int64),
    )


def make_shards(
    uri: str,
    *,
    seq_len: int = 32,
    rows: int = 300,
    unit_rows: int = 64,
    shards: int = 2,
    vocabulary: int = 50_257,
    validation: int = 40,
    fraction: float = 0.01,
    documents: int = 50,
) -> ShardSet:
    """A small shard set with both splits; the last unit of a shard is a partial one."""
    made = partial(random_rows, seq_len=seq_len, documents=documents, vocabulary=vocabulary)
    splits = {}
    for split, count, size in (("train", shards, rows), ("validation", min(1, validation), validation)):
        splits[split] = [
            write_shard(uri, shard_name(split, i, count), made(size, seed=i), unit_rows) for i in range(count)
        ]
    about = {"counts": {}, "settings": {"validation_fraction": fraction}, "inputs": {}}
    write_manifest(uri, seq_len=seq_len, unit_rows=unit_rows, splits=splits, **about)
    return open_shards(uri)
