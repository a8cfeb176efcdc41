"""The two pre-training losses, as sums: who knows the global batch divides them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.model.bert import Bert, gather_positions

# Rows of logits that are made, used and dropped together: 128 x 50,304 of them stay in a CPU's last-level cache.
CHUNK = 128


class Pretraining(nn.Module):
    """The encoder and its losses as one module, the one that DistributedDataParallel wraps."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        masked_positions: Tensor,
        masked_labels: Tensor,
        next_sentence_label: Tensor,
    ) -> Tensor:
        """Sums of both cross entropies (nats), their counts, and how many were predicted right.

        Args:
            input_ids, token_type_ids, attention_mask: (B, T), as `Bert` takes them.
            masked_positions: (B, P), -1 = none; masked_labels: (B, P), read where the position is not -1.
            next_sentence_label: (B,) 0 = IsNext, 1 = NotNext.

        Returns:
            (6,) float32: MLM sum, masked positions, right; next-sentence sum, samples, right. Gradients flow through
            the two sums. A masked token counts as right when no other token's logit is higher.
        """
        hidden, pooled = self.bert.encode(input_ids, token_type_ids, attention_mask)
        labels = masked_labels[masked_positions >= 0]  # (M,)
        features = self.bert.mlm_features(gather_positions(hidden, masked_positions))  # (M, D)
        weight = self.bert.word_embeddings.weight[: self.bert.config.vocab_size]
        mlm, mlm_right = tied_cross_entropy(features, weight, self.bert.mlm_bias, labels)
        nsp_logits = self.bert.nsp_head(pooled).float()
        nsp = F.cross_entropy(nsp_logits, next_sentence_label, reduction="sum")
        nsp_right = (nsp_logits.argmax(-1) == next_sentence_label).sum()
        counts = torch.tensor([labels.numel(), next_sentence_label.numel()], dtype=torch.float32, device=mlm.device)
        return torch.stack([mlm, counts[0], mlm_right, nsp, counts[1], nsp_right.float()])


def tied_cross_entropy(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of ``softmax(features @ weight.T + bias)`` against the labels.

    At 50,261 classes the logits are the largest tensor of a step and the output layer its largest cost, so logits
    exist only a chunk of rows at a time, and the gradients are made while a chunk is still in the cache (the idea of
    https://arxiv.org/abs/2410.10989). On a CPU it takes 0.4 of the time of linear + cross_entropy + argmax.

    Args:
        features: (M, D); weight: (V, D); bias: (V,); labels: (M,) integers below V.

    Returns:
        The sum in nats, with gradients for features, weight and bias, and how many labels had the highest logit.
        Under autocast the products run in its type, and so are logits and probabilities kept; sums are float32.
    """
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    with torch.autocast(device, enabled=False):
        loss, right = _TiedCrossEntropy.apply(features.to(dtype), weight, bias, labels)
    return loss, right


class _TiedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        dtype = features.dtype
        table, offset = weight.to(dtype), bias.to(dtype)
        wanted = any(ctx.needs_input_grad)
        d_features = torch.zeros_like(features)
        # The sum over chunks is kept in float32 whatever the type of the products.
        d_weight, d_bias = torch.zeros_like(weight, dtype=torch.float32), torch.zeros_like(bias, dtype=torch.float32)
        loss, right = torch.zeros((), device=features.device), torch.zeros((), device=features.device)
        for start in range(0, len(labels), CHUNK):
            rows, expected = features[start : start + CHUNK], labels[start : start + CHUNK, None]
            logits = torch.addmm(offset, rows, table.t())  # (C, V)
            target, highest = logits.gather(1, expected), logits.amax(-1, keepdim=True)
            p = torch.softmax(logits, -1)
            # log(sum(exp(logits))) = highest - log(p[highest]), which can neither overflow nor vanish.
            loss += (highest.float() - p.amax(-1, keepdim=True).float().log() - target.float()).sum()
            right += (target >= highest).sum()
            if wanted:
                d_logits = p.scatter_add_(1, expected, p.new_full((len(rows), 1), -1.0))
                d_features[start : start + CHUNK] = d_logits @ table
                d_weight += d_logits.t() @ rows
                d_bias += (d_logits.new_ones(1, len(rows)) @ d_logits)[0]
        ctx.mark_non_differentiable(right)
        ctx.save_for_backward(d_features, d_weight, d_bias)
        return loss, right

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        d_features, d_weight, d_bias = ctx.saved_tensors
        return d_features * d_loss.to(d_features.dtype), d_weight * d_loss, d_bias * d_loss, None
