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
    """Of the probe of one checkpoint; and of the baselines with an encoder, which are computed once: the untrained one
    and, where a run does not begin with random weights, its start.

    Padding and the judging of vectors, but for the products of retrieval, are left out, and so are baselines without an
    encoder.
    """

    task: str
    kind: str
    texts: int
    shared: int  # of them that are encoded for a task before this one, and count there
    tokens: int
    flops: float
    seconds: float
    baseline_flops: float
    baseline_seconds: float


def costs(
    tasks: Sequence[ProbeTask],
    config: BertConfig,
    tokenizer: TextTokenizer | None = None,
    *,
    begins_random: bool = True,
    threads: int = 1,
    gpu: bool = False,
) -> list[Cost]:
    """Read each task's texts, tokenise them, and measure how fast an encoder of this size is here.

    Args:
        tokenizer: of the run's shards; None for raybert's own.
        begins_random: what the run begins with is an untrained encoder, and is not probed.
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
            found.append(_cost(material, new, config, rate, starts=0 if begins_random else 1))
    return found


def threads_of(cpus: float | Literal["auto"]) -> int:
    """Threads of a probe with this share of CPUs. A share that is left to raybert is one at most."""
    return 1 if cpus == "auto" else max(1, int(cpus))


def _cost(material: Material, new: np.ndarray, config: BertConfig, rate: float, *, starts: int) -> Cost:
    """
    Args:
        new: (N,) which of the sequences no task before this one has had encoded.
        starts: probes of the run's start, which share passes as those of its checkpoints do.
    """
    task, every = material.task, material.sequences.lengths
    flops = _flops(material, new, config)
    untrained = _flops(material, np.ones_like(new), config)  # each task in a pass of its own
    # Of three trainings together, and each baseline has a budget of its own.
    most = task.max_seconds if isinstance(task, FinetuneTask) else np.inf
    seconds, of_untrained = (float(min(count / rate, most)) for count in (flops, untrained))
    return Cost(
        task=task.name,
        kind=kinds.of_task(task).name,
        texts=len(every),
        shared=int((~new).sum()),
        tokens=int(every[new].sum()),
        flops=flops,
        seconds=seconds,
        baseline_flops=untrained + starts * flops,
        baseline_seconds=of_untrained + starts * seconds,
    )


def _flops(material: Material, encoded: np.ndarray, config: BertConfig) -> float:
    """Operations of one encoder's probe, in which these of the sequences are encoded."""
    task, every = material.task, material.sequences.lengths.astype(np.float64)
    if isinstance(task, FinetuneTask):
        n_train = material.data.n_train
        trained = 3 * task.epochs * _forward(config, every[:n_train])  # backward is twice forward
        return len(SEEDS) * (trained + _forward(config, every[n_train:]))
    flops = _forward(config, every[encoded])
    if isinstance(material.data, Ranked):
        relevance = material.data.relevance
        flops += 2.0 * len(POOLINGS) * relevance.queries * relevance.documents * config.hidden_size
    return flops


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
    shown = Table("task", "kind", "texts", "tokens", "FLOPs", "time", "once", box=box.SIMPLE_HEAD, pad_edge=False)
    for cost in found:
        texts = f"{cost.texts:,}" + (f" ({cost.shared:,} shared)" if cost.shared else "")
        shown.add_row(escape(cost.task), cost.kind, texts, f"{cost.tokens:,}", *_shown([cost]))
    if len(found) > 1:
        shown.add_section()
        encoded, tokens = sum(cost.texts - cost.shared for cost in found), sum(cost.tokens for cost in found)
        shown.add_row("all", "", f"{encoded:,}", f"{tokens:,}", *_shown(found))
    shared = "; shared texts are encoded once" if any(cost.shared for cost in found) else ""
    shown.title = "one probe of a checkpoint"
    shown.caption = (
        f"time here, with {threads} thread{'s' * (threads > 1)}{shared}; at most once per run: the baselines of "
        "the untrained encoder and of a start that is not random"
    )
    return shown


def _shown(costs: Sequence[Cost]) -> tuple[str, str, str]:
    """FLOPs, time, and the time of the baselines, of all together."""
    flops, seconds = sum(cost.flops for cost in costs), sum(cost.seconds for cost in costs)
    baselines = sum(cost.baseline_seconds for cost in costs)
    return f"{flops:.2g}", format_seconds(seconds), format_seconds(baselines)
