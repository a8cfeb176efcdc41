"""The plan read in this process: what every other way to get the batches is compared with."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from raybert.data.block import Columns, build, empty, take, widen
from raybert.data.plan import Plan
from raybert.data.rng import fold
from raybert.data.spec import ORIGINAL, SampleSpec
from raybert.data.units import Unit, UnitRows
from raybert.tokenizer import Vocabulary

if TYPE_CHECKING:
    from raybert.data.shards import ShardSet

CACHED_UNITS = 4  # of 512 windows each, as `prepare` makes them


def read_unit(uri: str, unit: Unit, vocabulary: Vocabulary) -> UnitRows:
    """`raybert.data.shards.read_unit`, whose libraries a reader of other windows does without."""
    from raybert.data import shards

    return shards.read_unit(uri, unit, vocabulary)


class SampleReader:
    """Builds any samples of a split by their indices, reading only the units they lie in.

    A unit is kept while its samples are built: consecutive samples share it.
    """

    def __init__(self, shards: "ShardSet", *, seed: int, split: str = "train", spec: SampleSpec = ORIGINAL) -> None:
        vocabulary = shards.vocabulary
        if spec.whole_word:
            vocabulary = replace(vocabulary, word_starts=shards.tokenizer().word_starts)
        self.shards, self.seed, self.spec = shards, seed, replace(spec, vocabulary=vocabulary)
        self._units = shards.units(split)
        self.plan = Plan([unit.rows for unit in self._units], seed)
        self._read = lru_cache(maxsize=CACHED_UNITS)(self._read_unit)

    def _read_unit(self, unit: int) -> UnitRows:
        return read_unit(self.shards.uri, self._units[unit], self.shards.vocabulary)

    def build(self, index: np.ndarray) -> Columns:
        """Compact columns of the samples (N,), in their order."""
        epochs, units, rows = self.plan.locate(index)
        # Runs of samples in one unit of one epoch; the plan keeps a unit's samples together.
        change = np.flatnonzero((np.diff(units) != 0) | (np.diff(epochs) != 0)) + 1
        columns = empty(len(index), self.shards.seq_len, self.spec)
        for first, end in pairwise([0, *change.tolist(), len(index)]):
            run, epoch, unit = slice(first, end), int(epochs[first]), int(units[first])
            keys = fold(self.seed, epoch, unit, rows[run])
            build(self._read(unit), rows[run], keys, index[run], take(columns, run), self.spec)
        return columns


def iter_batches(
    shards_uri: str,
    *,
    seed: int,
    global_batch_size: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    spec: SampleSpec = ORIGINAL,
) -> Iterator[Columns]:
    """This rank's part of every global batch from `start_step` on, endlessly.

    Step k holds the samples [k G, (k + 1) G); rank r of W gets the r-th of W equal parts. Starting late does not
    read the steps before. `spec` is that of a run's objective (`raybert.data.spec.sample_spec`); the default is BERT's.

    Yields:
        A dict of numpy arrays with b = G / W: input_ids, token_type_ids (b, T) int64; attention_mask (b, T) bool;
        masked_positions (b, P) int64, -1 = none; masked_labels (b, P) int64, -100 = none; next_sentence_label (b,)
        int64, 0 = IsNext, 1 = NotNext; index (b,) int64.

    Raises:
        ValueError: the batch cannot be divided among the ranks.
        InputError: `shards_uri` is not a shard set.
    """
    if global_batch_size % world_size:
        raise ValueError(f"a global batch of {global_batch_size} cannot be divided among {world_size} ranks")
    from raybert.data.shards import open_shards

    reader = SampleReader(open_shards(shards_uri), seed=seed, spec=spec)
    part = global_batch_size // world_size
    step = start_step
    while True:
        first = step * global_batch_size + rank * part
        yield widen(reader.build(np.arange(first, first + part)))
        step += 1


def validation_batches(
    shards: "ShardSet", *, seed: int, batch_size: int, samples: int, spec: SampleSpec = ORIGINAL
) -> Iterator[Columns]:
    """Compact columns of the first `samples` validation samples of epoch 0: the same ones every time.

    Where the masked fraction changes during the run they have its last one.
    """
    reader = SampleReader(shards, seed=seed, split="validation", spec=replace(spec, masked=spec.masked.ended()))
    count = min(samples, reader.plan.rows)
    # A contrast among fewer pairs would be an easier one.
    count -= count % batch_size if spec.halves and count > batch_size else 0
    for first in range(0, count, batch_size):
        yield reader.build(np.arange(first, min(first + batch_size, count)))
