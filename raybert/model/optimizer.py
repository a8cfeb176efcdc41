"""AdamW as BERT uses it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def build(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    embedding_lr_ratio: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW over all of a model's parameters, in the groups of `parameter_groups`, whatever the ratio in their order.

    The fused implementation serves CPUs and GPUs: one pass over each parameter instead of ten.

    Args:
        embedding_lr_ratio: the table's learning rate as a fraction of the others' (`set_lr`). AdamW moves the row of a
            rare token as far as any other each time it is seen, by a gradient of one occurrence. Only a `Bert` has it.
    """
    groups = parameter_groups(model.parameters(), weight_decay)
    if embedding_lr_ratio != 1:
        table, *others = groups[0]["params"]
        assert table is model.word_embeddings.weight  # type: ignore[union-attr]
        groups[0]["params"] = others
        groups.insert(0, {"params": [table], "weight_decay": weight_decay, "lr_ratio": embedding_lr_ratio})
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next update; a group with a ratio has its fraction."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the moments of a checkpoint. Rates and decays stay as this optimizer's settings say.

    The order of the parameters is that of the model, however they are grouped.
    """
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decoupled weight decay on matrices alone: none on biases and layer norms, as in the original BERT."""
    every = list(parameters)
    return [
        {"params": [parameter for parameter in every if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in every if parameter.ndim < 2], "weight_decay": 0.0},
    ]
