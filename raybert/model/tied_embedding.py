"""The embedding table's gradient, made once although the table is used twice: to look tokens up and as output layer.

Autograd would make a second table of zeros for the looked-up rows and add both, 230 MB to and fro at 384 wide.
Backward reaches the output layer first, always: it leaves its gradient here, and the lookup adds its rows to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class TableGradient:
    """Carries the output layer's gradient (V, D) to the lookup within one backward pass."""

    value: Tensor | None = None


def lookup(weight: Tensor, ids: Tensor, gradient: TableGradient) -> Tensor:
    """Rows of the table: (V, D) and (N,) -> (N, D). Its backward pass hands on both uses' gradient."""
    rows: Tensor = _Lookup.apply(weight, ids, gradient)
    return rows


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, gradient: TableGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.gradient = weight.shape, gradient
        return weight.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        table, ctx.gradient.value = ctx.gradient.value, None
        if table is None:
            table = d_rows.new_zeros(ctx.shape)
        return table.index_add_(0, ids, d_rows), None, None
