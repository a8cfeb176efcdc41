"""The steps between two log lines: kept on the device, and read and added up over the ranks in one go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raybert.data.block import Columns
from raybert.model.objective import Objective
from raybert.train import ledger
from raybert.train.step import all_reduce_sums, no_sums


@dataclass(frozen=True)
class Totals:
    """An interval over all ranks. `norms`, `digests` and `skipped` have an entry a step."""

    first: int  # step
    sums: Tensor  # (3 L,) as in raybert.train.step, without the steps that were left out
    tokens: int  # those that were left out included
    norms: Sequence[float]
    digests: Sequence[int]

    @property
    def skipped(self) -> list[bool]:
        """True for a step whose update was skipped, because its gradient was not finite."""
        return [not math.isfinite(norm) for norm in self.norms]

    @property
    def grad_norm(self) -> float:
        """That of the last step with a finite one; NaN when there is none."""
        return next((norm for norm in reversed(self.norms) if math.isfinite(norm)), math.nan)


class Interval:
    """Collects steps from `first` on. Nothing waits for the device before `close`."""

    def __init__(self, first: int, objective: Objective, device: torch.device, world_size: int) -> None:
        self._first, self._device, self._world_size = first, device, world_size
        self._sums = no_sums(objective, device)
        self._norms: list[Tensor] = []
        self._digests: list[int] = []
        self._tokens = 0

    def add(self, columns: Sequence[Columns], sums: Tensor, norm: Tensor) -> None:
        """Note a step of this rank: its micro-batches, and what `train_step` returned."""
        self._sums += sums
        self._norms.append(norm)
        self._digests.append(sum(map(ledger.digest, columns)) % 2**64)
        self._tokens += sum(int(part["length"].sum()) for part in columns)

    def close(self) -> Totals:
        """Add up over the ranks; every rank has to call it after the same step."""
        tokens = torch.tensor([float(self._tokens)], device=self._device)
        totals = all_reduce_sums(torch.cat([self._sums, tokens]), self._world_size)
        digests = ledger.sum_over_ranks(self._digests, self._device, self._world_size)
        norms = torch.stack(self._norms).tolist()
        return Totals(self._first, totals[:-1], int(totals[-1].item()), norms, digests)


class Streak:
    """Counts steps in a row whose update was skipped."""

    def __init__(self, limit: int) -> None:
        self._limit, self._length = limit, 0

    def reached(self, totals: Totals) -> int | None:
        """The step at which the streak reached the limit, if it did in this interval."""
        for step, skipped in enumerate(totals.skipped, totals.first):
            self._length = self._length + 1 if skipped else 0
            if self._length >= self._limit:
                return step
        return None
