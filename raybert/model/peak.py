"""The limit that MFU is a share of: the rate of plain matrix products, measured on this worker."""

import time
from collections.abc import Callable

import torch


def peak_flops(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.2, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Best measured rate of square matrix products (FLOP/s) on the device, with the threads that torch has now.

    Measured instead of looked up, so that one code serves every CPU and GPU; all workers measure at the same time,
    as they will train. On a busy CPU a small product can end before another process takes the core; a large one keeps
    all threads at work. The better rate counts.
    """
    sizes = (8192,) if device.type == "cuda" else (256, 1024)
    best = 0.0
    for size in sizes:
        measured = product(device, dtype, size, clock)
        end = time.perf_counter() + seconds / len(sizes)
        while True:
            best = max(best, 2 * size**3 / measured())
            if time.perf_counter() >= end:
                break
    return best


def product(
    device: torch.device, dtype: torch.dtype, size: int, clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """A function that multiplies two square matrices of this size and returns the seconds it took; warmed up."""
    # Of its own: what it draws must not change the weights that are drawn after it.
    rng = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=rng).to(dtype) for _ in range(2))

    def measured() -> float:
        start = clock()
        a @ b
        _synchronize(device)
        return clock() - start

    measured()  # the first product also sets up the library
    return measured


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
