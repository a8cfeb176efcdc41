"""AdamW as BERT uses it."""

import torch
from torch import nn


def build(
    model: nn.Module, *, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices alone: none on biases and layer norms, as in the original BERT.

    The fused implementation serves CPUs and GPUs: one pass over each parameter instead of ten.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)
