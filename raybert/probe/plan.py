"""What a probe of each task costs, known before it runs: texts, tokens, operations, and seconds on this machine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from raybert.encode import POOLINGS
from raybert.encode.encoders import RaybertEncoder, Sequences
from raybert.encode.vectors import embed
from raybert.model.bert import Bert, flops_per_token
from raybert.model.config import BertConfig
from raybert.probe import kinds
from raybert.probe.finetune import SEEDS, FinetuneTask
from raybert.probe.kind import ProbeTask
from raybert.probe.measure import Material, digests, prepare
from raybert.probe.retrieval import Ranked
from raybert.records import format_seconds
from raybert.tokenizer import TextTokenizer

MEASURED_TOKENS = 16_384


@dataclass(frozen=True)
class Cost:
    """Of one probe without its baselines, which are computed once. Padding and the judging of vectors, but for the
    products of retrieval, are left out."""

    task: str
    kind: str
    texts: int
    shared: int  # of them that are encoded for a task before this one, and count there
    tokens: int
    flops: float
    seconds: float


def costs(
    tasks: Sequence[ProbeTask],
    config: BertConfig,
    tokenizer: TextTokenizer | None = None,
    *,
    threads: int = 1,
    gpu: bool = False,
) -> list[Cost]:
    """Read each task's texts, tokenise them, and measure how fast an encoder of this size is here.

    Args:
        tokenizer: of the run's shards; None for raybert's own.
        threads: of a probe on CPUs, see `threads_of`.
        gpu: the run gives its probes a share of a GPU; it counts where there is one.

    Returns:
        The tasks in the order in which they are probed.

    Raises:
        InputError: a task's texts cannot be judged.
    """
    if not tasks:
        return []
    where = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    model = Bert(config).eval()
    model.tokenizer = tokenizer
    encoder = RaybertEncoder(model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rate = _rate(encoder, config, where)
    finally:
        torch.set_num_threads(before)
    found = []
    for group in kinds.passes(tasks):
        materials = [prepare(task, encoder.tokenize, encoder.positions) for task in group]
        seen: set[bytes] = set()
        for material in materials:
            keys = [key.tobytes() for key in digests(material.sequences)] if len(group) > 1 else []
            new = np.array([key not in seen for key in keys] or [True] * len(material.sequences.cuts))
            seen.update(keys)
            found.append(_cost(material, new, config, rate))
    return found


def threads_of(cpus: float | Literal["auto"]) -> int:
    """Threads of a probe with this share of CPUs. A share that is left to raybert is one at most."""
    return 1 if cpus == "auto" else max(1, int(cpus))


def _cost(material: Material, new: np.ndarray, config: BertConfig, rate: float) -> Cost:
    """
    Args:
        new: (N,) which of the sequences no task before this one has had encoded.
    """
    task, every = material.task, material.sequences.lengths.astype(np.float64)
    lengths = every[new]
    flops = _forward(config, lengths)
    if isinstance(task, FinetuneTask):
        n_train = material.data.n_train
        trained = 3 * task.epochs * _forward(config, every[:n_train])  # backward is twice forward
        flops = len(SEEDS) * (trained + _forward(config, every[n_train:]))
    if isinstance(material.data, Ranked):
        relevance = material.data.relevance
        flops += 2.0 * len(POOLINGS) * relevance.queries * relevance.documents * config.hidden_size
    seconds = flops / rate
    if isinstance(task, FinetuneTask):
        seconds = min(seconds, task.max_seconds)
    kind = kinds.of_task(task).name
    return Cost(task.name, kind, len(every), int((~new).sum()), int(lengths.sum()), flops, seconds)


def _forward(config: BertConfig, lengths: np.ndarray) -> float:
    """Operations of one pass: a third of a training step's, at the mean length weighted by tokens."""
    if not len(lengths):
        return 0.0
    tokens = float(lengths.sum())
    return tokens * flops_per_token(config, round(float((lengths**2).sum()) / tokens), 0.0) / 3


def _rate(encoder: RaybertEncoder, config: BertConfig, device: torch.device) -> float:
    """Operations a second, measured on sequences of a common length after a pass that is not timed."""
    length = min(64, encoder.positions)
    count = MEASURED_TOKENS // length
    ids = np.random.default_rng(0).integers(0, config.vocab_size, count * length).astype(np.int32)
    lengths = np.full(count, length)
    sequences = Sequences(ids, np.arange(count + 1) * length, lengths.astype(np.int32), 0)
    embed(encoder, sequences, device=device)
    begun = time.perf_counter()
    embed(encoder, sequences, device=device)
    return _forward(config, lengths.astype(np.float64)) / (time.perf_counter() - begun)


def table(found: Sequence[Cost], *, threads: int = 1) -> RenderableType:
    """A row a task, and their sum; a sentence where there is no task."""
    if not found:
        return (
            "The run has no probe tasks, so probes cost nothing; to probe, set probe.tasks or probe.suite, and "
            "every.probe."
        )
    shown = Table("task", "kind", "texts", "tokens", "FLOPs", "time here", box=box.SIMPLE_HEAD, title="one probe")
    for cost in found:
        texts = f"{cost.texts:,}" + (f" ({cost.shared:,} shared)" if cost.shared else "")
        figures = (texts, f"{cost.tokens:,}", f"{cost.flops:.2g}")
        shown.add_row(escape(cost.task), cost.kind, *figures, format_seconds(cost.seconds))
    if len(found) > 1:
        shown.add_section()
        encoded, tokens = sum(cost.texts - cost.shared for cost in found), sum(cost.tokens for cost in found)
        seconds = format_seconds(sum(cost.seconds for cost in found))
        shown.add_row("all", "", f"{encoded:,}", f"{tokens:,}", f"{sum(cost.flops for cost in found):.2g}", seconds)
    shared = "; shared texts are encoded once" if any(cost.shared for cost in found) else ""
    shown.caption = (
        f"per checkpoint, with {threads} thread{'s' * (threads > 1)}{shared}; plus the baselines, once per run"
    )
    return shown
