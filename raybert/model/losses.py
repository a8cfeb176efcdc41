"""The pre-training losses, as sums: who knows the global batch divides them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.model import layout as layouts
from raybert.model.bert import Bert
from raybert.model.dropout import Noise
from raybert.model.layout import Layout, Packed
from raybert.model.objective import ORIGINAL, Objective
from raybert.model.tied_embedding import TableGradient

# Label of a place at which there is nothing to predict.
IGNORED = -100
# Rows of logits that are made, used and dropped together: in bfloat16 50 MB at 50,304 classes. With fewer the sum of
# the weight's gradients over chunks, 77 MB read and written for each, costs more than it saves in cache. A GPU has no
# cache for 50 MB, and memory for more.
CHUNK, GPU_CHUNK = 512, 4096


class Pretraining(nn.Module):
    """The encoder and its losses as one module, the one that DistributedDataParallel wraps."""

    def __init__(self, bert: Bert, objective: Objective = ORIGINAL) -> None:
        super().__init__()
        self.bert = bert
        self.objective = objective
        # What no loss reaches stays as it is: DistributedDataParallel would wait for its gradient.
        losses = self.objective.losses
        pooler = "nsp" in losses or ("pooler" in self.objective.pooled and {"contrast", "bag"} & set(losses))
        bert.nsp_head.requires_grad_("nsp" in losses)
        bert.pooler.requires_grad_(bool(pooler))

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor | None,
        masked_positions: Tensor,
        masked_labels: Tensor,
        next_sentence_label: Tensor,
        document: Tensor | None = None,
        bag_labels: Tensor | None = None,
        parts: Sequence[tuple[int, Noise | None]] | None = None,
        mlm_gradient: Tensor | None = None,
        starts: Tensor | None = None,
        part: Tensor | None = None,
    ) -> Tensor:
        """The sum of each loss (nats), its count, and how many were predicted right.

        Args:
            input_ids, token_type_ids, attention_mask: (B, T), as `Bert` takes them.
            masked_positions: (B, P), -1 = none; masked_labels: (B, P), read where the position is not -1.
            next_sentence_label: (B,) 0 = IsNext, 1 = NotNext.
            document: (B,) whose rows are no negatives of each other; for a contrast, which takes rows 2i and 2i + 1
                for a pair.
            bag_labels: (B, K) tokens that a row's vector predicts, -100 = none; for a bag.
            parts: samples of each micro-batch among the B, and its dropout noise (None in evaluation). Given on a CPU,
                where padding then costs nothing and no micro-batch depends on the others. None keeps every shape
                fixed, as GPUs and torch.compile want it, and leaves dropout to torch.
            mlm_gradient: as `tied_cross_entropy` takes it.
            starts: (S + 1,) of packed sequences (`raybert.data.packing`), which stand for the B rows. `input_ids` and
                `token_type_ids` are (N,) then, there is no `attention_mask`, `masked_positions` (M,) are places among
                the N, and what belongs to no sample has the label -100. Every shape is fixed, and dropout is torch's.
            part: (S,) the micro-batch of each packed sequence, -1 = none; for a contrast.

        Returns:
            (3 L,) float32, three for each of `objective.losses`: its sum, through which gradients flow, its count and
            how many were right. Of masked words: positions; a token is right when no other's logit is higher. Of next
            sentences: samples. Of a contrast: pairs; right is a text whose other half is nearest, over both directions
            and all vectors. Of a bag: labels; right are those with their vector's highest logit, one a vector at most.
        """
        if starts is not None:
            packed = layouts.packed(starts, len(input_ids), self.bert.config.max_position_embeddings)
            hidden, pooled = self.bert.encode_packed(input_ids, token_type_ids, packed)
            # Places without a label are spread over the tokens: gradients of one row are added one after the other.
            spread = torch.arange(len(masked_positions), device=hidden.device) % len(hidden)
            places = masked_positions.where(masked_positions >= 0, spread)
            features = self.bert.mlm_features(hidden[places])  # (M, D)
            weight, bias = self.bert.word_embeddings.weight, self.bert.mlm_bias
            mlm, mlm_right = tied_cross_entropy(features, weight, bias, masked_labels)
            sums = [mlm, (masked_positions >= 0).sum().float(), mlm_right]
            if "nsp" in self.objective.losses:
                sums += self._next_sentence(pooled, next_sentence_label)
            if document is not None or bag_labels is not None:
                vectors = self._packed_vectors(hidden, pooled, packed)
                if document is not None:
                    sums += self._packed_contrast(vectors, document, part)
                if bag_labels is not None:
                    sums += self._bag(vectors, bag_labels)
            return torch.stack(sums)
        assert attention_mask is not None
        batch, length = input_ids.shape
        if parts is None:
            layout = layouts.padded(batch, length, attention_mask, None)
        else:
            layout = layouts.unpadded(attention_mask, parts)
        table = TableGradient() if parts is not None and torch.is_grad_enabled() else None
        hidden, pooled = self.bert.encode_tokens(input_ids, token_type_ids, layout, table)
        rows = torch.arange(0, batch * length, length, device=input_ids.device)[:, None]
        places = (masked_positions.clamp(min=0) + rows).flatten()  # (B P,)
        labels = masked_labels.where(masked_positions >= 0, IGNORED).flatten()
        if parts is not None:
            wanted = labels != IGNORED
            places, labels = places[wanted], labels[wanted]
        features = self.bert.mlm_features(hidden[layout.rows(places)])  # (M, D)
        weight, bias = self.bert.word_embeddings.weight, self.bert.mlm_bias
        mlm, mlm_right = tied_cross_entropy(features, weight, bias, labels, mlm_gradient, table)
        sums = [mlm, (masked_positions >= 0).sum().float(), mlm_right]
        if "nsp" in self.objective.losses:
            sums += self._next_sentence(pooled, next_sentence_label)
        if document is not None or bag_labels is not None:
            vectors = self._vectors(hidden, pooled, layout, attention_mask)
            sizes = [batch] if parts is None else [samples for samples, _ in parts]
            if document is not None:
                sums += self._contrast(vectors, document, sizes)
            if bag_labels is not None:
                sums += self._bag(vectors, bag_labels)
        return torch.stack(sums)

    def _next_sentence(self, pooled: Tensor, labels: Tensor) -> list[Tensor]:
        logits = self.bert.nsp_head(pooled).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        right = (logits.argmax(-1) == labels).sum()
        return [loss, (labels != IGNORED).sum().float(), right.float()]

    def _packed_vectors(self, hidden: Tensor, pooled: Tensor, layout: Packed) -> list[Tensor]:
        """(S, D) as `_vectors`; a sequence without tokens has a mean of zeros."""
        found = {"pooler": pooled}
        if "mean" in self.objective.pooled:
            sums = hidden.new_zeros(pooled.shape).index_add(0, layout.sequence, hidden)
            found["mean"] = sums / layout.starts.diff().clamp(min=1)[:, None]
        return [found[name] for name in self.objective.pooled]

    def _packed_contrast(self, vectors: list[Tensor], document: Tensor, part: Tensor | None) -> list[Tensor]:
        """As `_contrast`, of all micro-batches at once, since their sizes may differ and the shapes may not."""
        assert part is not None
        sums = [contrast(vector, document, self.objective.temperature, part) for vector in vectors]
        loss, right = (torch.stack(values).sum() / len(vectors) for values in zip(*sums, strict=True))
        return [loss, (part[0::2] >= 0).sum().float(), right]

    def _vectors(self, hidden: Tensor, pooled: Tensor, layout: Layout, mask: Tensor) -> list[Tensor]:
        """(B, D) of each row, for each of the objective's vectors. The mean is over all tokens, as in probes."""
        found = {"pooler": pooled}
        if "mean" in self.objective.pooled:
            if layout.tokens is None:
                sums = (hidden.view(*mask.shape, -1) * mask[..., None]).sum(1)
            else:
                # On CPUs alone, where the order of the additions is always the same.
                rows = layout.tokens // mask.shape[1]
                sums = hidden.new_zeros(pooled.shape).index_add(0, rows, hidden)
            found["mean"] = sums / mask.sum(1, keepdim=True)
        return [found[name] for name in self.objective.pooled]

    def _contrast(self, vectors: list[Tensor], document: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Negatives are of the same micro-batch alone, so the loss depends neither on ranks nor on what is joined."""
        parts = [
            contrast(v, d, self.objective.temperature)
            for vector in vectors
            for v, d in zip(vector.split(list(sizes)), document.split(list(sizes)), strict=True)
        ]
        loss, right = (torch.stack(values).sum() / len(vectors) for values in zip(*parts, strict=True))
        return [loss, torch.full_like(loss, len(document) // 2), right]

    def _bag(self, vectors: list[Tensor], labels: Tensor) -> list[Tensor]:
        features = self.bert.mlm_features(torch.cat(vectors))  # (R, D)
        weight, bias = self.bert.word_embeddings.weight, self.bert.mlm_bias
        loss, right = tied_cross_entropy(features, weight, bias, labels.repeat(len(vectors), 1))
        return [loss / len(vectors), (labels >= 0).sum().float(), right / len(vectors)]


def contrast(
    vectors: Tensor, document: Tensor, temperature: float, part: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE (https://arxiv.org/abs/1807.03748) over the cosines of b pairs: each half finds its other half.

    Args:
        vectors: (2b, D), pair i in rows 2i and 2i + 1.
        document: (2b,), equal for rows of one document, which are no negatives of each other.
        part: (2b,), equal for rows of one micro-batch, which alone are negatives of each other; -1 for what is no
            pair. None: all are of one.

    Returns:
        The sum over pairs of the mean of both directions' cross entropies (nats), in float32, and how many halves have
        their other half as the nearest, as a number of pairs. A pair without negatives adds no loss and is
        not right.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        one, other = F.normalize(vectors.float(), dim=-1).unflatten(0, (-1, 2)).unbind(1)  # (b, D)
        scores = one @ other.t() / temperature  # (b, b)
        of = document[0::2]
        own = torch.eye(len(of), dtype=torch.bool, device=of.device)
        apart = of[:, None] == of
        places = torch.arange(len(of), device=of.device)
        if part is not None:
            apart = apart | (part[0::2, None] != part[0::2])
            places = places.where(part[0::2] >= 0, IGNORED)
        scores = scores.masked_fill(apart & ~own, -torch.inf)
        alone = apart.all(1)
        both = torch.cat([scores, scores.t()])  # (2b, b)
        loss = F.cross_entropy(both, places.repeat(2), reduction="sum", ignore_index=IGNORED) / 2
        right = ((both.argmax(-1) == places.repeat(2)) & ~alone.repeat(2)).sum() / 2
    return loss, right


def tied_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    expected_gradient: Tensor | None = None,
    table: TableGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of ``softmax(features @ weight.T + bias)`` against the labels, one or K of each row.

    At 50,261 classes the logits are the largest tensor of a step and the output layer its largest cost, so logits
    exist only a chunk of rows at a time, and the gradients are made while a chunk is at hand (the idea of
    https://arxiv.org/abs/2410.10989).

    Args:
        features: (M, D); weight: (V or more, D), rows past the bias are no classes; bias: (V,); labels: (M,) or (M, K)
            integers below V, those of a row different, or `IGNORED`.
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
        labels = labels if labels.ndim == 2 else labels[:, None]
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
        chunk = CHUNK if features.device.type == "cpu" else GPU_CHUNK
        for start in range(0, len(labels), chunk):
            rows, wanted_class = features[start : start + chunk], labels[start : start + chunk]
            real = wanted_class >= 0  # (C, K)
            counts = real.any(1, keepdim=True)  # (C, 1)
            wanted_class = wanted_class.clamp(min=0)
            logits = torch.addmm(offset, rows, table.t())  # (C, V)
            target, highest = logits.gather(1, wanted_class), logits.amax(-1, keepdim=True)
            p = torch.softmax(logits, -1)
            del logits
            # log(sum(exp(logits))) = highest - log(p[highest]), which can neither overflow nor vanish.
            nats = highest.float() - p.amax(-1, keepdim=True).float().log() - target.float()
            # Not in place: torch 2.11 compiles a result that was added to in place as one without a gradient.
            loss = loss + nats.where(real, 0).sum()
            right = right + ((target >= highest) & real).sum()
            if wanted:
                # In place by index: scatter_add_ would go through all of p.
                places = wanted_class + torch.arange(len(rows), device=rows.device)[:, None] * p.shape[1]
                d_logits = p
                if labels.shape[1] == 1:
                    d_logits.view(-1)[places[:, 0]] -= 1
                else:
                    d_logits *= real.sum(1, keepdim=True)
                    # Added up, since all labels that are ignored are at place 0 of their row.
                    minus = -real.flatten().to(dtype)
                    d_logits.view(-1).index_put_((places.flatten(),), minus, accumulate=True)
                d_features[start : start + chunk] = (d_logits @ table) * counts
                factor = (counts if expected is None else counts * expected).to(dtype)
                part = d_logits.t() @ (rows * factor)
                d_weight = d_weight.add_(part) if start else part.float()
                d_bias += (factor.t() @ d_logits)[0]
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
