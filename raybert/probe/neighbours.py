"""Kind neighbours, which needs no labels: does the first half of a span find its second half among those of others?

The spans are windows of a shard set's validation split, so a run that has shards has this probe.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from raybert.data.shards import ShardSet, open_shards, read_unit
from raybert.errors import InputError
from raybert.probe.kind import FEWEST, Headline, ProbeTask
from raybert.probe.retrieval import Ranked, Retrieval, from_right_pairs

SHORTEST = 16  # tokens of a span: less is hardly a text in each half


class NeighboursTask(ProbeTask):
    """Spans of a shard set's validation split, cut in two. In a run that names `neighbours` they are its own shards."""

    URIS: ClassVar[tuple[str, ...]] = ("shards",)

    kind: Literal["neighbours"] = "neighbours"
    shards: str | None = Field(default=None, description="shard set to take spans from; by default the run's own")
    n_test: int = Field(default=1000, ge=FEWEST, description="spans to draw where there are more")
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

    def check(self, task: ProbeTask) -> None:
        self.read(task)

    def read(self, task: Any) -> Ranked:
        """
        Raises:
            InputError: the task names no shards, they are none, or they hold too few validation windows.
        """
        if task.shards is None:
            raise InputError(
                f"The probe task {task.name} needs text: write {task.name}@SHARDS, a directory of `raybert prepare`."
            )
        halves = list(_halves(open_shards(task.shards), task))
        if len(halves) < FEWEST:
            raise InputError(
                f"The probe task {task.name} needs {FEWEST} validation windows of {SHORTEST} tokens or more, and "
                f"{task.shards} has {len(halves)}; prepare with a larger --validation-fraction, or leave the task out."
            )
        return from_right_pairs(self.name, task, halves, task.n_test, task.seed)

    def summary(self, record: Mapping[str, Any]) -> str:
        documents = record.get("n_documents", "?")
        return (
            f"the first halves of {record.get('n_test', '?')} validation spans, each of which looks for its second "
            f"half among {documents}"
        )

    def held_out(self, task: Any) -> Iterable[str]:
        """The validation split is not trained on."""
        return ()


def _halves(shards: ShardSet, task: NeighboursTask) -> Iterable[tuple[str, str]]:
    """Of drawn validation windows, in the order of the shards, the texts before and behind a cut: the sentence end
    nearest to the middle, or the middle itself where there is one sentence alone."""
    units = shards.units("validation")
    rows = sum(unit.rows for unit in units)
    # More than are needed, since some are too short.
    drawn = np.sort(np.random.default_rng(task.seed).permutation(rows)[: 2 * task.n_test])
    decode, first, found = shards.tokenizer().decode, 0, 0
    for unit in units:
        here = drawn[(drawn >= first) & (drawn < first + unit.rows)] - first
        first += unit.rows
        if not len(here):
            continue
        windows = read_unit(shards.uri, unit, shards.vocabulary)
        for row in here:
            tokens = windows.tokens[windows.token_offsets[row] : windows.token_offsets[row + 1]]
            if len(tokens) < SHORTEST:
                continue
            ends = windows.ends[windows.end_offsets[row] : windows.end_offsets[row + 1]][:-1].astype(np.int64)
            cut = int(ends[np.abs(ends - len(tokens) // 2).argmin()]) if len(ends) else len(tokens) // 2
            before, behind = decode(tokens[:cut]).strip(), decode(tokens[cut:]).strip()
            if before and behind:
                found += 1
                yield before, behind
                if found == task.n_test:
                    return
