"""The whole encoder and a linear head trained on a task's texts: the loop, as `transformers` trains a text classifier.

Shapes: B texts of a batch, T tokens of its longest one, D hidden size, C outputs of the head (1 for a score).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from raybert.encode.encoders import Encoder, Sequences
from raybert.encode.vectors import batches, mean_of_tokens, pad
from raybert.model.optimizer import parameter_groups, set_lr
from raybert.model.schedule import lr_at

CLIP = 1.0  # L2 norm of the gradient
HEAD_STD = 0.02  # BERT's initializer_range
WEIGHT_DECAY = 0.01
PREDICTED_TOKENS = 8192  # of a batch without gradients


@dataclass(frozen=True)
class Plan:
    """How a task is trained."""

    epochs: int
    batch_size: int
    lr: float
    warmup: float  # share of the steps
    pooling: str
    dropout: float  # before the head

    def steps(self, texts: int) -> int:
        return self.epochs * -(-texts // self.batch_size)


class Head(nn.Module):
    """Dropout and a linear layer, drawn as BERT's weights are."""

    def __init__(self, hidden_size: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(hidden_size, outputs)
        nn.init.normal_(self.linear.weight, std=HEAD_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        found: Tensor = self.linear(self.dropout(pooled))
        return found


def train(
    encoder: Encoder,
    head: Head,
    sequences: Sequences,
    targets: np.ndarray,
    plan: Plan,
    *,
    rng: np.random.Generator,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> Iterator[float]:
    """Train both in place; yields the loss of each step, and stops early when the seconds are over.

    AdamW with decay on matrices alone, a linear warm-up and a linear decay to 0 (Devlin et al. 2019,
    https://arxiv.org/abs/1810.04805), cross-entropy of classes or the squared error of scores. As in transformers the
    first step of a warm-up has rate 0.

    Args:
        sequences: of the training texts.
        targets: (N,) int64 classes, or float32 scores for a head of one output.
        rng: of the order of the texts, drawn anew each epoch.
    """
    encoder.module.to(device).train()
    head.to(device).train()
    parameters = [p for module in (encoder.module, head) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(parameters, WEIGHT_DECAY), lr=plan.lr)
    total = plan.steps(len(targets))
    warmup = round(plan.warmup * total)
    end, step = time.monotonic() + seconds, 0
    for _ in range(plan.epochs):
        order = rng.permutation(len(targets))
        for first in range(0, len(order), plan.batch_size):
            if time.monotonic() > end:
                return
            lr = lr_at(step, peak_lr=plan.lr, total_steps=total, warmup_steps=warmup, decay="linear")
            set_lr(optimizer, lr if step >= warmup else plan.lr * step / warmup)
            rows = order[first : first + plan.batch_size]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                outputs = head(_pooled(encoder, sequences, rows, plan.pooling, device))  # (B, C)
            wanted = torch.from_numpy(targets[rows]).to(device)
            loss = (
                nn.functional.cross_entropy(outputs.float(), wanted)
                if outputs.shape[1] > 1
                else nn.functional.mse_loss(outputs.float()[:, 0], wanted)
            )
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            yield loss.item()


def predict(
    encoder: Encoder, head: Head, sequences: Sequences, plan: Plan, *, device: torch.device, dtype: torch.dtype
) -> np.ndarray:
    """The head's outputs, float32 (N, C)."""
    encoder.module.eval()
    head.eval()
    found = np.empty((len(sequences.cuts), head.linear.out_features), dtype=np.float32)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for rows in batches(sequences.lengths, PREDICTED_TOKENS):
            found[rows] = head(_pooled(encoder, sequences, rows, plan.pooling, device)).float().cpu().numpy()
    return found


def _pooled(encoder: Encoder, sequences: Sequences, rows: np.ndarray, pooling: str, device: torch.device) -> Tensor:
    """Vectors (B, D) of the texts with these numbers."""
    ids, types, mask = pad(sequences, rows, encoder.pad_id)
    hidden, pooled = encoder.encode(ids.to(device), types.to(device), None if mask is None else mask.to(device))
    if pooling == "pooler":
        return pooled
    return hidden[:, 0] if pooling == "cls" else mean_of_tokens(hidden, mask)
