"""Multi-head self-attention over a layout's blocks: the kernel that was measured fastest on each kind of device.

Packed sequences have a kernel of their own (`raybert.model.varlen`). Padded ones take `scaled_dot_product_attention`
on GPUs (flash attention). torch's CPU kernel reaches 180 GFLOP/s at T=512 and 80 at T=128 and knows no dropout, for
which it falls back to float32 products; bfloat16 matmul - softmax - matmul reaches 360 and more on the same two cores,
forward and backward, dropout included.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raybert.model.dropout import apply_mask, apply_mask_
from raybert.model.layout import Block, Layout, Packed
from raybert.model.varlen import varlen_attention


def attention(qkv: Tensor, heads: int, layout: Layout | Packed, rate: float) -> Tensor:
    """Softmax attention of every sample over itself.

    Args:
        qkv: (N, 3D) queries, keys and values, each with the heads side by side.
        rate: dropout of the attention's probabilities.

    Returns:
        (N, D).
    """
    if isinstance(layout, Packed):
        return varlen_attention(qkv, heads, layout, rate)
    parts = []
    for block in layout.blocks:
        own = qkv if len(layout.blocks) == 1 else qkv[block.start : block.stop]
        if qkv.device.type != "cpu" or torch.compiler.is_compiling():
            parts.append(_flash(own, heads, block, rate))
        else:
            with torch.autocast("cpu", enabled=False):
                parts.append(_MatmulAttention.apply(own, heads, block, rate))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flash(qkv: Tensor, heads: int, block: Block, rate: float) -> Tensor:
    size = qkv.shape[1] // 3
    split = qkv.view(block.samples, block.length, 3, heads, size // heads)
    query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
    mask = None if block.mask is None else block.mask[:, None, None, :]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
    return mixed.transpose(1, 2).reshape(-1, size)


class _MatmulAttention(torch.autograd.Function):
    """Three batched products and a softmax, all in the type of `qkv`. R = B x H rectangles of T x T."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, block: Block, rate: float) -> Tensor:
        split = _to_heads(qkv, 3, heads, block)  # (3, R, T, D/H)
        query, key, value = split
        query.mul_(1 / math.sqrt(query.shape[-1]))
        scores = torch.bmm(query, key.transpose(1, 2))  # (R, T, T)
        if block.mask is not None:
            # The lowest number, not minus infinity: a sample without any token must not become NaN.
            bias = torch.zeros(block.mask.shape, dtype=scores.dtype)
            bias.masked_fill_(~block.mask, torch.finfo(scores.dtype).min)
            scores.view(block.samples, heads, block.length, block.length).add_(bias[:, None, None, :])
        p = scores.softmax(-1)
        del scores
        keep, kept_p = None, p
        if rate > 0.0:
            if block.noise is None:
                raise ValueError("dropout on a CPU needs a layout with noise")
            keep = block.noise.keep(p.numel(), rate).view(p.shape)
            kept_p = apply_mask(p, keep)
        mixed = torch.bmm(kept_p, value)
        if keep is not None:
            mixed.mul_(1 / (1 - rate))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(split, p)
            ctx.keep, ctx.heads, ctx.block, ctx.rate = keep, heads, block, rate
        return _from_heads(mixed[None], heads, block)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        (query, key, value), p = ctx.saved_tensors
        d_mixed = _to_heads(d_out, 1, ctx.heads, ctx.block)[0]
        kept_p = p
        if ctx.keep is not None:
            d_mixed.mul_(1 / (1 - ctx.rate))
            kept_p = apply_mask(p, ctx.keep)
        gradient = torch.empty((3, *query.shape), dtype=query.dtype)
        torch.bmm(kept_p.transpose(1, 2), d_mixed, out=gradient[2])
        d_p = torch.bmm(d_mixed, value.transpose(1, 2))
        if ctx.keep is not None:
            apply_mask_(d_p, ctx.keep)
        d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
        torch.bmm(d_scores, key, out=gradient[0]).mul_(1 / math.sqrt(query.shape[-1]))
        torch.bmm(d_scores.transpose(1, 2), query, out=gradient[1])
        return _from_heads(gradient, ctx.heads, ctx.block), None, None, None


def _to_heads(values: Tensor, parts: int, heads: int, block: Block) -> Tensor:
    """(n, parts x D) -> a new (parts, R, T, D/H); zeros at padding."""
    if block.places is not None:
        rectangle = values.new_zeros(block.samples * block.length, values.shape[1])
        values = rectangle.index_copy_(0, block.places, values)
    split = values.view(block.samples, block.length, parts, heads, -1).permute(2, 0, 3, 1, 4)
    # `contiguous` would hand out the values' own memory where one head of one sample is all there is.
    copy = torch.empty(split.shape, dtype=values.dtype)
    return copy.copy_(split).view(parts, block.samples * heads, block.length, -1)


def _from_heads(values: Tensor, heads: int, block: Block) -> Tensor:
    """(parts, R, T, D/H) -> (n, parts x D)"""
    parts, size = values.shape[0], values.shape[-1]
    joined = values.view(parts, block.samples, heads, block.length, size).permute(1, 3, 0, 2, 4)
    flat = joined.reshape(block.samples * block.length, parts * heads * size)
    return flat if block.places is None else flat.index_select(0, block.places)
