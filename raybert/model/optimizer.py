"""AdamW as BERT uses it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def build(
    model: nn.Module, *, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> torch.optim.AdamW:
    """AdamW over all of a model's parameters, in the groups of `parameter_groups`.

    The fused implementation serves CPUs and GPUs: one pass over each parameter instead of ten.
    """
    groups = parameter_groups(model.parameters(), weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decoupled weight decay on matrices alone: none on biases and layer norms, as in the original BERT."""
    every = list(parameters)
    return [
        {"params": [parameter for parameter in every if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in every if parameter.ndim < 2], "weight_decay": 0.0},
    ]
