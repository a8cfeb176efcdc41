"""Which type matrix products run in: float32 or bfloat16."""

from functools import lru_cache

import torch

from raybert.model.peak import product

TYPES = (torch.float32, torch.bfloat16)
ROUNDS, SIZE = 5, 512


def pick_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The autocast type. "auto" is bfloat16 where the hardware has it and multiplies it faster than float32.

    That it has the instructions says little about a CPU: an Intel Xeon with AVX512-BF16, whose AMX the hypervisor
    hides, multiplies bfloat16 at half the rate of float32, and an AMD EPYC at four times the rate. So it is measured,
    once a process.
    """
    if requested != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[requested]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16")):
        return torch.float32
    return _faster_on_cpu()


@lru_cache(maxsize=1)
def _faster_on_cpu() -> torch.dtype:
    """The type of the fastest product of several in turn, so that a busy moment of the machine does not decide."""
    products = {dtype: product(torch.device("cpu"), dtype, SIZE) for dtype in TYPES}
    best = {dtype: float("inf") for dtype in TYPES}
    for _ in range(ROUNDS):
        for dtype, seconds in products.items():
            best[dtype] = min(best[dtype], seconds())
    return min(best, key=lambda dtype: best[dtype])
