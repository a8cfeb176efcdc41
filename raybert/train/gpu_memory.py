"""What to do about a GPU that has no more memory, in a sentence."""

import torch

from raybert.config import Config
from raybert.data.shards import open_shards
from raybert.errors import one_line

# What others than torch's own allocator say: the runtime (of pinned memory too), the driver, Triton, cuBLAS and cuDNN;
# and torch's words inside another error.
EXHAUSTED = (
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "error [cuda]: out of memory",
    "_status_alloc_failed",
    "cuda out of memory",
)


def exhausted(error: BaseException) -> bool:
    """Whether a GPU had no memory left, or the host none to pin for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error).lower() for mark in EXHAUSTED)


def out_of_memory(error: BaseException, *, step: int, micro_batch: int, seq_len: int, checkpointing: bool) -> str:
    """The settings to change, after a fault at a step."""
    what = "The GPU"
    if not isinstance(error, torch.OutOfMemoryError):
        what += " or the host, whose memory is pinned for it,"
    other = "" if checkpointing else ", or set train.gradient_checkpointing=true"
    halved = f"halve train.micro_batch to {micro_batch // 2}" if micro_batch > 1 else "use a smaller model.size"
    return (
        f"{what} ran out of memory at step {step}, with train.micro_batch={micro_batch} samples of up to "
        f"T={seq_len} tokens; {halved}{other}. ({one_line(error)[:200]})"
    )


def sentence(error: BaseException, config: Config, *, step: int) -> str:
    """`out_of_memory` with a run's own settings."""
    train = config.train
    return out_of_memory(
        error,
        step=step,
        micro_batch=train.micro_batch,
        seq_len=open_shards(config.data.shards).seq_len,
        checkpointing=train.gradient_checkpointing,
    )
