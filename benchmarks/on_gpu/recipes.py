"""The original's recipe (jobs/compact.yaml) and that of jobs/record.yaml, as plain loops without Ray.

`tests/unit/test_gpu_benchmark.py` compares them with the files.
"""

import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from benchmarks.on_gpu.carried import WindowReader, Windows
from raybert.data.block import Columns
from raybert.data.spec import SampleSpec
from raybert.errors import RunFailed
from raybert.model import optimizer
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.objective import Objective
from raybert.model.schedule import lr_at
from raybert.model.sizes import SIZES
from raybert.tokenizer import Vocabulary
from raybert.train.alone import alone
from raybert.train.step import train_step, warm_up

ADAM = {"weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6}
AHEAD = 8  # steps whose samples are being built


@dataclass(frozen=True)
class Recipe:
    """What a run's settings say. Seeds are 0."""

    size: str = "compact"
    seq_len: int = 512
    dropout: float = 0.1
    steps: int = 10_000
    global_batch: int = 1024
    micro_batch: int = 64
    lr: float = 6e-4
    embedding_lr_ratio: float = 1.0
    warmup: float = 0.05
    objective: Objective = field(default_factory=Objective)
    spec: SampleSpec = field(default_factory=SampleSpec)

    def bert(self) -> BertConfig:
        """With as many rows as the vocabulary has tokens."""
        sizes = {**SIZES[self.size], "vocab_size": self.spec.vocabulary.size}
        return BertConfig(**sizes, max_position_embeddings=self.seq_len, dropout=self.dropout)

    def within(self, vocabulary: Vocabulary) -> "Recipe":
        """The same in another vocabulary."""
        return replace(self, spec=replace(self.spec, vocabulary=vocabulary))

    def lr_of(self, step: int) -> float:
        warmup = round(self.warmup * self.steps)
        return lr_at(step, peak_lr=self.lr, total_steps=self.steps, warmup_steps=warmup, decay="linear")


# At 1,024 windows of 512 places, which is the original's half a million, padding included.
ORIGINAL = Recipe()
RECORD = Recipe(
    seq_len=128,
    dropout=0.0,
    steps=375,
    global_batch=256,
    micro_batch=256,
    lr=5e-5,
    embedding_lr_ratio=0.1,
    objective=Objective(pair="contrastive", bag_weight=0.5),
    spec=SampleSpec(next_sentence=False, halves=True, bag_tokens=16),
)


class Trainer:
    """Model, optimizer and feed of a recipe on a device; compiled on a GPU where that works."""

    def __init__(
        self, recipe: Recipe, device: torch.device, dtype: torch.dtype, *, compiles: bool | None = None
    ) -> None:
        """`compiles`: None for what a run does by itself."""
        torch.manual_seed(0)
        self.recipe, self.dtype = recipe, dtype
        self.bert = Bert(recipe.bert()).to(device)
        self.adam = optimizer.build(self.bert, lr=recipe.lr, embedding_lr_ratio=recipe.embedding_lr_ratio, **ADAM)
        worker = alone(
            self.bert,
            recipe.objective,
            recipe.spec,
            device=device,
            dtype=dtype,
            micro_batch=recipe.micro_batch,
            seq_len=recipe.seq_len,
            compile="auto" if compiles is None else compiles,
            one_shape=True,
        )
        self.model, self.feed, self.notes = worker.model, worker.feed, worker.notes
        self.step = 0

    def warm_up(self, parts: list[Columns]) -> None:
        """Compile, and have the libraries choose what they run: a step without an update."""
        batches = self.feed.rungs() or self.feed.send(parts[:1])
        for batch in batches:
            warm_up(self.model, batch, self.dtype, self.recipe.objective, validation=False)

    def train(self, parts: list[Columns]) -> Tensor:
        """One optimizer step; returns its sums, which stay on the device."""
        recipe = self.recipe
        sums, _ = train_step(
            self.model,
            self.adam,
            self.feed(parts),
            lr=recipe.lr_of(min(self.step, recipe.steps - 1)),
            grad_clip=1.0,
            dtype=self.dtype,
            seed=0,
            step=self.step,
            first_micro_batch=0,
            global_batch=sum(len(part["index"]) for part in parts),
            objective=recipe.objective,
        )
        self.step += 1
        return sums


def require_finite(sums: Tensor) -> None:
    """
    Raises:
        RunFailed: the first of the sums, of a loss, is no positive number. It is 0 where every update was left out.
    """
    loss = float(sums.flatten()[0])
    if not 0 < loss < float("inf"):
        raise RunFailed(f"A loss is {loss}: gradients or losses were not finite. Look at the part `correct`.")


def micro_batches(reader: WindowReader, recipe: Recipe, step: int) -> list[Columns]:
    """The samples of a step."""
    first = step * recipe.global_batch
    starts = range(first, first + recipe.global_batch, recipe.micro_batch)
    return [reader.build(np.arange(at, at + recipe.micro_batch)) for at in starts]


_shared: list[tuple[WindowReader, Recipe]] = []  # read by the processes that are forked below


def _build(step: int) -> list[Columns]:
    return micro_batches(*_shared[0], step)


def stream(windows: Windows, recipe: Recipe) -> Generator[list[Columns]]:
    """The steps' samples from step 0 on, built ahead by other processes. Call it before a GPU is used: it forks."""
    _shared[:] = [(WindowReader(windows, spec=recipe.spec), recipe)]
    pool = ProcessPoolExecutor(max(1, min(8, (os.cpu_count() or 1) - 2)), mp_context=get_context("fork"))
    waiting: deque[Future[list[Columns]]] = deque(pool.submit(_build, step) for step in range(AHEAD))

    def built() -> Generator[list[Columns]]:
        step = AHEAD
        try:
            while True:
                waiting.append(pool.submit(_build, step))
                step += 1
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return built()
