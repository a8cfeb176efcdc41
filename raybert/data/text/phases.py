"""The two kinds of task of prepare, as plain functions: read a fragment into spills, gather a shard from them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raybert import storage
from raybert.data.shards import Shard, shard_name, write_shard
from raybert.data.text import documents as readers
from raybert.data.text import spill
from raybert.data.text.held_out import digest
from raybert.data.text.settings import Settings
from raybert.data.text.values import EMPTY, MISSING, Bad
from raybert.data.text.windows import encode_document
from raybert.errors import InputError
from raybert.tokenizer import TextTokenizer, Vocabulary

SPILL_TOKENS = 8 << 20  # a fragment that is one large file which cannot be divided spills this often


@dataclass(frozen=True)
class Spilled:
    """What reading reports of one spill: the driver keeps this, and the windows stay in the file."""

    uri: str  # empty when there was no window
    offsets: np.ndarray
    tokens: np.ndarray
    counts: Counter[str]
    size: int  # input bytes that are done with
    textless: list[tuple[str, int]]  # (file, documents) of each piece all of whose documents lack a text


@dataclass(frozen=True)
class ShardJob:
    """One shard: buckets ``first`` to ``stop`` of every spill, counted over all splits."""

    split: str
    name: str
    first: int
    stop: int


@dataclass(frozen=True)
class Gathered:
    split: str
    shard: Shard
    documents: int  # that begin in this shard
    copies: int  # of documents, left out


def read_fragment(
    number: int,
    fragment: Sequence[readers.Piece],
    spills_uri: str,
    settings: Settings,
    tokenizer: TextTokenizer,
) -> Iterator[Spilled]:
    """Phase 1: the documents of a fragment -> windows -> spills. Run again, it writes the same files.

    Raises:
        InputError: a file is damaged.
    """
    collector, counts, part = spill.Collector(), Counter[str](), 0
    textless: list[tuple[str, int]] = []

    def flush(size: int) -> Spilled:
        result = collector.spill(settings.validation_fraction)
        uri = storage.join(spills_uri, f"{number:06d}-{part:04d}.spill") if collector.size else ""
        if uri:
            storage.write_bytes(uri, result.data)
        counts["tokens"] = collector.size
        return Spilled(uri, result.offsets, result.tokens, counts, size, textless)

    for piece in fragment:
        documents = missing = 0
        for text in readers.documents(piece, settings.text_column, settings.split_txt):
            documents += 1
            missing += text == MISSING
            _add(text, collector, counts, tokenizer, settings)
            if collector.size >= SPILL_TOKENS:
                yield flush(0)
                collector, counts, textless, part = spill.Collector(), Counter(), [], part + 1
        if missing == documents:
            textless.append((piece.uri, documents))
    yield flush(sum(piece.size for piece in fragment))


def _add(
    text: str | Bad, collector: spill.Collector, counts: Counter[str], tokenizer: TextTokenizer, settings: Settings
) -> None:
    """Collect the windows of one document, or count why there are none."""
    counts["read"] += 1
    if settings.held_out and not isinstance(text, Bad) and digest(text) in settings.held_out:
        counts["held_out"] += 1
        return
    document = text if isinstance(text, Bad) else encode_document(text, tokenizer, settings.seq_len)
    if document is None:
        document = EMPTY
    if isinstance(document, Bad):
        counts[f"bad:{document.reason}"] += 1
        return
    collector.add(document)
    counts["too_short"] += not document.windows
    counts["short_windows"] += len(document.short)
    counts["short_tokens"] += sum(window.ends[-1] - window.start for window in document.short)


def shard_jobs(split_number: int, split: str, tokens: int, shard_tokens: int) -> list[ShardJob]:
    """The shards of a split that holds so many tokens."""
    ranges = spill.shard_ranges(tokens, shard_tokens)
    base = split_number * spill.BUCKETS
    return [
        ShardJob(split, shard_name(split, i, len(ranges)), base + first, base + stop)
        for i, (first, stop) in enumerate(ranges)
    ]


def gather_shard(
    job: ShardJob, sources: list[tuple[str, np.ndarray]], output: str, unit_rows: int, vocabulary: Vocabulary
) -> Gathered:
    """Phase 2: the job's buckets of every spill (URI, offsets) -> one shard.

    Raises:
        InputError: a spill cannot be found on this machine.
    """
    wanted = [(uri, int(offsets[job.first]), int(offsets[job.stop])) for uri, offsets in sources]
    wanted = [(uri, start, stop) for uri, start, stop in wanted if stop > start]
    try:
        slices = storage.read_ranges(wanted)
    except FileNotFoundError as error:
        raise InputError(
            f"A file that another task wrote to {output} is missing on this node; give an output that all nodes "
            "of the cluster share."
        ) from error
    rows, documents, copies = spill.merge(slices, vocabulary)
    return Gathered(job.split, write_shard(output, job.name, rows, unit_rows), documents, copies)
