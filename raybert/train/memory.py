"""What a process that trains on a CPU does with memory: freed memory stays, plans of matrix products do not.

glibc maps every large tensor anew, and the kernel zeroes its pages when they are first touched: 77 MB, a gradient of
the embedding table, takes 19 ms instead of 2. A step makes and drops hundreds of MB. The process's peak does not grow.

oneDNN keeps a plan for each shape of a product, 1,024 of them, and so does what lies between torch and it. Without
padding every step has shapes of its own, so the plans are not used again, and they stay between the large pieces of
freed memory, which then cannot be joined. jobs/record.yaml in bfloat16 had 19 GB after 45 steps and grew on; with few
plans it has 6.9 GB from the fourth step on, and a step takes 5.3 s instead of 6.5.
"""

import ctypes
import os
import sys

# Plans that are kept; read at the first product.
FEW_PLANS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
# Read by glibc at the start of a process. One arena, since others cannot hold more than 64 MB in one piece.
WORKER_ENVIRONMENT = {
    **FEW_PLANS,
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**26),
}


def worker_environment(on_gpu: bool) -> dict[str, str]:
    """`WORKER_ENVIRONMENT`, but for what is set otherwise where the run is started; empty where tensors lie on GPUs."""
    if on_gpu:
        return {}
    return {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def tune_memory() -> bool:
    """The same for the main thread of a process that runs already but has multiplied nothing yet.

    False where the C library is not glibc.
    """
    for name, value in FEW_PLANS.items():
        os.environ.setdefault(name, value)
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    return all(mallopt(option, value) for option, value in options)
