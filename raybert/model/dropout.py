"""Dropout whose masks cost little on a CPU.

torch draws a CPU's masks one number after the other: 4.5 ns an element, which with the attention's dropout was more
than half of a training step. Here a mask is one byte an element, cut from 64-bit words, and is applied with a bitwise
and. On GPUs, and where torch.compile fuses its own, torch's dropout is used.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Integers of a float's width: a mask of -1 (keep) and 0 (drop) widens to all of its bits or none.
_SAME_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Noise:
    """One micro-batch's dropout masks: the same seed and shapes give the same masks, whatever else runs."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.SFC64(seed))

    @property
    def state(self) -> Any:
        """What the next masks depend on; set it to draw the same ones again."""
        return self._generator.bit_generator.state

    @state.setter
    def state(self, state: Any) -> None:
        self._generator.bit_generator.state = state

    def keep(self, count: int, rate: float) -> Tensor:
        """(count,) int8: 0 = drop with probability `rate`, else -1.

        A byte knows the rate to 1/256 only, so the threshold of each mask is one of the two neighbours of 256 `rate`,
        drawn so that an element's probability is exact.
        """
        words = self._generator.integers(0, 2**64, -(-count // 8), dtype=np.uint64)
        low = math.floor(256 * rate)
        threshold = low + int(self._generator.random() < 256 * rate - low)
        if threshold in (0, 256):
            return torch.full((count,), -1 if threshold == 0 else 0, dtype=torch.int8)
        # Signed bytes: those below the threshold drop. Comparisons that give booleans are ten times slower.
        kept = torch.from_numpy(words.view(np.int8)[:count]).clamp_(threshold - 129, threshold - 128)
        return torch.rsub(kept, threshold - 129)


def apply_mask(values: Tensor, keep: Tensor) -> Tensor:
    """The values where the mask of `Noise.keep` is -1, and 0 where it is 0; of the same shape."""
    integer = _SAME_WIDTH[values.element_size()]
    return (values.view(integer) & keep.to(integer)).view(values.dtype)


def apply_mask_(values: Tensor, keep: Tensor) -> Tensor:
    """`apply_mask` in place."""
    integer = _SAME_WIDTH[values.element_size()]
    values.view(integer).bitwise_and_(keep.to(integer))
    return values


def dropout(values: Tensor, rate: float, keep: Tensor | None) -> Tensor:
    """Values of any shape, zeroed and scaled by 1 / (1 - rate): by a given mask, or by torch's own when None."""
    if rate == 0.0:
        return values
    if keep is None:
        return F.dropout(values, rate)
    dropped: Tensor = _Dropout.apply(values, keep.view(values.shape), 1 / (1 - rate))
    return dropped


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.keep, ctx.scale = keep, scale  # type: ignore[attr-defined]
        return apply_mask(values, keep).mul_(scale)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        kept = apply_mask(gradient.contiguous(), ctx.keep)  # type: ignore[attr-defined]
        return kept.mul_(ctx.scale), None, None  # type: ignore[attr-defined]
