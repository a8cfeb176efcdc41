"""Kind neighbours, which needs no labels: does the first half of a span find its second half among those of others?

The spans are windows of a shard set's validation split, so a run that has shards has this probe.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from raybert.data.shards import ShardSet, UnitRows, open_shards, read_unit
from raybert.errors import InputError
from raybert.probe.kind import FEWEST, Headline, ProbeTask, Record
from raybert.probe.retrieval import Ranked, Retrieval, from_right_pairs

FEW_WINDOWS = 1000  # that are read in moments
SHORTEST = 16  # tokens of a span: less is hardly a text in each half
UNITS = 64  # that are read, or as many as hold twice the spans that are drawn


class NeighboursTask(ProbeTask):
    """Spans of a shard set's validation split, cut in two. In a run that names `neighbours` they are its own shards."""

    URIS: ClassVar[tuple[str, ...]] = ("shards",)

    kind: Literal["neighbours"] = "neighbours"
    shards: str | None = Field(default=None, description="shard set to take spans from; by default the run's own")
    n_test: int = Field(default=1000, ge=FEWEST, description="number of spans to draw; all are used if there are fewer")
    seed: int = Field(default=0, ge=0, description="seed of that draw")

    def stamps(self) -> list[str]:
        return [open_shards(self.shards).manifest_hash] if self.shards else []


class Neighbours(Retrieval):
    name = "neighbours"
    settings: ClassVar[type[ProbeTask]] = NeighboursTask
    counted = "spans"
    headline: ClassVar[Headline] = Headline(
        key="mrr_at_10",
        title="MRR@10",
        short="MRR@10",
        share=False,
        others={"recall_at_1": "recall@1"},
        method="nearest frozen vectors by cosine",
    )

    def check(self, task: Any) -> None:
        """By the manifest alone, but for a small split. The texts are read where the probe runs."""
        shards = _shards(task)
        # So many tokens cannot be more spans.
        _require_enough(task, min(shards.rows("validation"), shards.tokens("validation") // SHORTEST))
        if shards.rows("validation") <= FEW_WINDOWS:
            self.read(task)

    def read(self, task: Any) -> Ranked:
        """
        Raises:
            InputError: the task names no shards, they are none, or they hold too few validation windows.
        """
        spans, dropped = _draw(_shards(task), task)
        _require_enough(task, len(spans))
        return replace(from_right_pairs(self.name, task, spans, task.n_test, task.seed), dropped=dropped)

    def about(self, data: Ranked) -> Record:
        return super().about(data) | {"dropped": data.dropped}

    def summary(self, record: Mapping[str, Any]) -> str:
        documents = record.get("n_documents", "?")
        return (
            f"the first halves of {record.get('n_test', '?')} validation spans, each used to find its second half "
            f"among {documents}"
        )

    def held_out(self, task: Any) -> Iterable[str]:
        """The validation split is not trained on."""
        return ()


def _shards(task: NeighboursTask) -> ShardSet:
    """
    Raises:
        InputError: the task names no shards, or they are none.
    """
    if task.shards is None:
        raise InputError(
            f"The probe task {task.name} needs a shard set: write {task.name}@SHARDS, a directory that "
            "`raybert prepare` wrote."
        )
    return open_shards(task.shards)


def _require_enough(task: NeighboursTask, spans: int) -> None:
    if spans < FEWEST:
        raise InputError(
            f"The probe task {task.name} needs {FEWEST} validation windows of {SHORTEST} tokens or more, but "
            f"{task.shards} has {spans}; prepare with a larger --validation-fraction, or leave the task out."
        )


def _draw(shards: ShardSet, task: NeighboursTask) -> tuple[list[tuple[str, str]], int]:
    """Up to `n_test` spans as the texts before and behind their cuts, drawn by the seed and in the order of the shards,
    and how many of the windows among which they were drawn are none: too short, or without text on one side.

    Of a large split not all is read but units that the seed chooses: each is a fair sample of the corpus.
    """
    rng = np.random.default_rng(task.seed)
    units = shards.units("validation")
    most = max(UNITS, -(-2 * task.n_test // shards.unit_rows))
    decode = shards.tokenizer().decode
    drawn: list[tuple[float, tuple[int, int], tuple[str, str]]] = []  # of the lowest keys, which are random; places
    dropped = 0
    for number in np.sort(rng.permutation(len(units))[:most]):
        windows = read_unit(shards.uri, units[number], shards.vocabulary)
        keys = rng.random(len(windows))
        highest = drawn[-1][0] if len(drawn) == task.n_test else 1.0
        short = np.diff(windows.token_offsets) < SHORTEST
        dropped += int(short.sum())
        for row in np.flatnonzero(~short & (keys < highest)):
            before, behind = _halves(windows, row, decode)
            if before and behind:
                drawn.append((float(keys[row]), (int(number), int(row)), (before, behind)))
            else:
                dropped += 1
        drawn = sorted(drawn)[: task.n_test]
    return [halves for _, _, halves in sorted(drawn, key=lambda each: each[1])], dropped


def _halves(windows: UnitRows, row: np.integer, decode: Callable[[Iterable[int]], str]) -> tuple[str, str]:
    """A window's texts before and behind a cut: the sentence end nearest to the middle, or the middle itself where
    there is one sentence alone."""
    tokens = windows.tokens[windows.token_offsets[row] : windows.token_offsets[row + 1]]
    ends = windows.ends[windows.end_offsets[row] : windows.end_offsets[row + 1]][:-1].astype(np.int64)
    cut = int(ends[np.abs(ends - len(tokens) // 2).argmin()]) if len(ends) else len(tokens) // 2
    # Tokens may be parts of a character: one that was cut through decodes to the sign for what is none.
    before, behind = (decode(part).strip("\ufffd").strip() for part in (tokens[:cut], tokens[cut:]))
    return before, behind
