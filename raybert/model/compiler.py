"""torch.compile where it works: its compilers (Triton, a C compiler) need not be there, or may not know the card."""

import functools
from typing import Literal, cast

import torch
from torch import nn
from torch._functorch import config as functorch_config

from raybert.errors import one_line

UNCOMPILED = "torch.compile is not used, which costs speed but does not change results"


def wanted(setting: Literal["auto"] | bool, device: torch.device) -> bool:
    """Whether `train.compile` asks for it."""
    return device.type == "cuda" if setting == "auto" else setting


def compiled(module: nn.Module) -> nn.Module:
    """The module, compiled for fixed shapes at its first call."""
    # Otherwise layers that are computed again draw their dropout from generators of the compiled graph's own, which no
    # seed of a step reaches. Holds for all that this thread compiles.
    functorch_config.graphsafe_rng_functionalization = False
    return cast(nn.Module, torch.compile(module, dynamic=False))


@functools.cache
def why_not(device: torch.device) -> str:
    """Why torch.compile cannot be used on this device, as a sentence; empty if a test compilation succeeds.

    The first call takes seconds.
    """
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            small = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.1)).to(device)
            compiled(small)(torch.ones(8, 64, device=device)).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except Exception as fault:  # of a compiler, a driver or a card that nobody foresaw: the same runs uncompiled
        reason = f"{type(fault).__name__}: {one_line(fault)[:200]}"
        return f"{UNCOMPILED}: a test compilation failed ({reason})."
    return ""
