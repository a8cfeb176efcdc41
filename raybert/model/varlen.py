"""Attention over packed sequences of different lengths: flash attention's kernel for them, or plain torch.

`torch.nn.attention.varlen.varlen_attn` is that kernel without dropout; with it the operator below is called, which
`varlen_attn` itself wraps. It takes 16-bit types alone, on GPUs of compute capability 8.0 and newer. Where it does not
run the same sequences are computed with a mask of N x N: slow, and the definition that the kernel is tested with.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from raybert.errors import one_line
from raybert.model import layout as layouts
from raybert.model.layout import Packed

TYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)
WIDEST_HEAD, HEAD_MULTIPLE = 256, 8


def varlen_attention(qkv: Tensor, heads: int, layout: Packed, rate: float) -> Tensor:
    """Softmax attention of every packed sequence over itself.

    Args:
        qkv: (N, 3D) queries, keys and values, each with the heads side by side.
        rate: dropout of the attention's probabilities.

    Returns:
        (N, D).
    """
    split = qkv.view(len(qkv), 3, heads, -1)  # (N, 3, H, D/H)
    query, key, value = split.unbind(1)
    attend = _kernel if qkv.device.type == "cuda" and qkv.dtype in TYPES else _plain
    return attend(query, key, value, layout, rate).reshape(len(qkv), -1)


def _kernel(query: Tensor, key: Tensor, value: Tensor, layout: Packed, rate: float) -> Tensor:
    """As `_plain`."""
    starts, longest = layout.starts, layout.longest
    if rate == 0.0:
        from torch.nn.attention.varlen import varlen_attn  # a second to import, which only GPUs have a use for

        return cast(Tensor, varlen_attn(query, key, value, starts, starts, longest, longest))
    # The last two: not causal, and no mask of the dropout returned.
    dropped: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, rate, False, False
    )[0]
    return dropped


def _plain(query: Tensor, key: Tensor, value: Tensor, layout: Packed, rate: float) -> Tensor:
    """(N, H, D/H) each, and so is the result."""
    own = layout.sequence[:, None] == layout.sequence  # (N, N)
    query, key, value = (values.transpose(0, 1)[None] for values in (query, key, value))  # (1, H, N, D/H)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=own, dropout_p=rate)
    return mixed[0].transpose(0, 1)


def why_not(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why the kernel cannot be used here, as the end of a sentence; empty if a small test of it succeeds."""
    if device.type != "cuda":
        return "there is no GPU"
    if dtype not in TYPES:
        return f"the matrix products are in {str(dtype).removeprefix('torch.')}, but the kernel needs bfloat16"
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if capability < CAPABILITY:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, but the kernel needs 8.0"
    if head_size > WIDEST_HEAD or head_size % HEAD_MULTIPLE:
        return (
            f"the kernel needs a head size that is a multiple of {HEAD_MULTIPLE} and at most {WIDEST_HEAD}, not "
            f"{head_size}"
        )
    try:
        error = _trial(device, dtype, head_size)
    except Exception as fault:  # of a driver, a build of torch or a card that nobody foresaw: the padded path remains
        return f"the kernel failed a test on {name} ({one_line(fault)[:200]})"
    return "" if error < 0.02 else f"the kernel's result on {name} is off by a relative error of {error:.2g}"


def _trial(device: torch.device, dtype: torch.dtype, head_size: int) -> float:
    """The relative error of outputs and gradients beside plain torch in float32, over sequences of which one is empty.

    With dropout the kernel only has to run.
    """
    generator = torch.Generator(device).manual_seed(0)
    starts = torch.tensor([0, 5, 38, 40, 40], dtype=torch.int32, device=device)
    layout = layouts.packed(starts, 40, 64)
    values = torch.randn(40, 6 * head_size, device=device, generator=generator).to(dtype)
    weights = torch.randn(40, 2 * head_size, device=device, generator=generator)
    found = []
    for kind in (dtype, torch.float32):
        qkv = values.to(kind).requires_grad_()
        mixed = varlen_attention(qkv, 2, layout, 0.0).float()
        found.append(torch.cat([mixed.flatten(), torch.autograd.grad((mixed * weights).sum(), qkv)[0].flatten()]))
    qkv = values.clone().requires_grad_()
    torch.autograd.grad(varlen_attention(qkv, 2, layout, 0.5).float().sum(), qkv)
    ours, exact = found
    return float((ours - exact).norm() / exact.norm())
