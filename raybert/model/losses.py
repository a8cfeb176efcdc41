"""The two pre-training losses, as sums: who knows the global batch divides them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.model import layout as layouts
from raybert.model.bert import Bert
from raybert.model.dropout import Noise
from raybert.model.tied_embedding import TableGradient

# Label of a place at which there is nothing to predict.
IGNORED = -100
# Rows of logits that are made, used and dropped together: in bfloat16 50 MB at 50,304 classes. With fewer the sum of
# the weight's gradients over chunks, 77 MB read and written for each, costs more than it saves in cache.
CHUNK = 512


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
        parts: Sequence[tuple[int, Noise | None]] | None = None,
        mlm_gradient: Tensor | None = None,
    ) -> Tensor:
        """Sums of both cross entropies (nats), their counts, and how many were predicted right.

        Args:
            input_ids, token_type_ids, attention_mask: (B, T), as `Bert` takes them.
            masked_positions: (B, P), -1 = none; masked_labels: (B, P), read where the position is not -1.
            next_sentence_label: (B,) 0 = IsNext, 1 = NotNext.
            parts: samples of each micro-batch among the B, and its dropout noise (None in evaluation). Given on a CPU,
                where padding then costs nothing and no micro-batch depends on the others. None keeps every shape
                fixed, as GPUs and torch.compile want it, and leaves dropout to torch.
            mlm_gradient: as `tied_cross_entropy` takes it.

        Returns:
            (6,) float32: MLM sum, masked positions, right; next-sentence sum, samples, right. Gradients flow through
            the two sums. A masked token counts as right when no other token's logit is higher.
        """
        batch, length = input_ids.shape
        if parts is None:
            layout = layouts.padded(batch, length, attention_mask, None)
        else:
            layout = layouts.unpadded(attention_mask, parts)
        table = TableGradient() if parts is not None and torch.is_grad_enabled() else None
        hidden, pooled = self.bert.encode_tokens(input_ids, token_type_ids, layout, table)
        starts = torch.arange(0, batch * length, length, device=input_ids.device)[:, None]
        places = (masked_positions.clamp(min=0) + starts).flatten()  # (B P,)
        labels = masked_labels.where(masked_positions >= 0, IGNORED).flatten()
        if parts is not None:
            wanted = labels != IGNORED
            places, labels = places[wanted], labels[wanted]
        features = self.bert.mlm_features(hidden[layout.rows(places)])  # (M, D)
        weight, bias = self.bert.word_embeddings.weight, self.bert.mlm_bias
        mlm, mlm_right = tied_cross_entropy(features, weight, bias, labels, mlm_gradient, table)
        nsp_logits = self.bert.nsp_head(pooled).float()
        nsp = F.cross_entropy(nsp_logits, next_sentence_label, reduction="sum")
        nsp_right = (nsp_logits.argmax(-1) == next_sentence_label).sum()
        masked = (masked_positions >= 0).sum()
        samples = torch.full_like(mlm, batch)
        return torch.stack([mlm, masked.float(), mlm_right, nsp, samples, nsp_right.float()])


def tied_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    expected_gradient: Tensor | None = None,
    table: TableGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of ``softmax(features @ weight.T + bias)`` against the labels.

    At 50,261 classes the logits are the largest tensor of a step and the output layer its largest cost, so logits
    exist only a chunk of rows at a time, and the gradients are made while a chunk is at hand (the idea of
    https://arxiv.org/abs/2410.10989).

    Args:
        features: (M, D); weight: (V or more, D), rows past the bias are no classes; bias: (V,); labels: (M,) integers
            below V, or `IGNORED`.
        expected_gradient: () what the gradient of the sum will be, when that is known: the weight's gradient is then
            made with it, which saves a pass over the table. It may be wrong, at the cost of that pass.
        table: where the weight's gradient is left for `lookup`, which must take it up.

    Returns:
        The sum in nats, with gradients for features, weight and bias, and how many labels had the highest logit.
        Under autocast the products run in its type, and so are logits and probabilities kept; sums are float32.
    """
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    with torch.autocast(device, enabled=False):
        loss, right = _TiedCrossEntropy.apply(features.to(dtype), weight, bias, labels, expected_gradient, table)
    return loss, right


class _TiedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        expected: Tensor | None,
        table_gradient: TableGradient | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = features.dtype
        table = weight.to(dtype)
        offset = F.pad(bias.to(dtype), (0, len(weight) - len(bias)), value=-torch.inf)
        wanted = any(ctx.needs_input_grad)
        d_features = torch.zeros_like(features)
        # The sum over chunks is kept in float32 whatever the type of the products.
        d_weight, d_bias = torch.zeros(0), torch.zeros_like(offset, dtype=torch.float32)
        loss, right = torch.zeros((), device=features.device), torch.zeros((), device=features.device)
        for start in range(0, len(labels), CHUNK):
            rows, wanted_class = features[start : start + CHUNK], labels[start : start + CHUNK]
            counts = (wanted_class >= 0)[:, None]  # (C, 1)
            wanted_class = wanted_class.clamp(min=0)[:, None]
            logits = torch.addmm(offset, rows, table.t())  # (C, V)
            target, highest = logits.gather(1, wanted_class), logits.amax(-1, keepdim=True)
            p = torch.softmax(logits, -1)
            del logits
            # log(sum(exp(logits))) = highest - log(p[highest]), which can neither overflow nor vanish.
            nats = highest.float() - p.amax(-1, keepdim=True).float().log() - target.float()
            loss += nats.where(counts, 0).sum()
            right += ((target >= highest) & counts).sum()
            if wanted:
                # In place by index: scatter_add_ would go through all of p.
                places = wanted_class[:, 0] + torch.arange(len(rows), device=rows.device) * p.shape[1]
                d_logits = p
                d_logits.view(-1)[places] -= 1
                d_features[start : start + CHUNK] = (d_logits @ table) * counts
                real = (counts if expected is None else counts * expected).to(dtype)
                part = d_logits.t() @ (rows * real)
                d_weight = d_weight.add_(part) if start else part.float()
                d_bias += (real.t() @ d_logits)[0]
        if not len(d_weight):
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.mark_non_differentiable(right)
        ctx.save_for_backward(d_features, d_weight, d_bias[: len(bias)], expected)
        ctx.table_gradient = table_gradient
        return loss, right

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_features, d_weight, d_bias, expected = ctx.saved_tensors
        if expected is None or not torch.equal(expected, d_loss):
            factor = d_loss if expected is None else d_loss / expected
            d_weight, d_bias = d_weight * factor, d_bias * factor
        d_features = d_features * d_loss.to(d_features.dtype)
        if ctx.table_gradient is not None:
            ctx.table_gradient.value, d_weight = d_weight, None
        return d_features, d_weight, d_bias, None, None, None
