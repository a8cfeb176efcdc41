"""What to do about a GPU that has no more memory, in a sentence."""

import torch

from raybert.config import Config
from raybert.data.shards import open_shards
from raybert.errors import one_line

# Of errors that are not torch's own: the driver's, of pinned memory too, and cuBLAS's for its workspace.
EXHAUSTED = ("cuda error: out of memory", "cublas_status_alloc_failed")


def exhausted(error: BaseException) -> bool:
    """Whether a GPU had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error).lower() for mark in EXHAUSTED)


def out_of_memory(error: BaseException, *, step: int, micro_batch: int, seq_len: int, checkpointing: bool) -> str:
    """The settings to change, after a fault at a step."""
    other = "" if checkpointing else ", or set train.gradient_checkpointing=true"
    halved = f"halve train.micro_batch to {micro_batch // 2}" if micro_batch > 1 else "use a smaller model.size"
    return (
        f"The GPU ran out of memory at step {step}, with train.micro_batch={micro_batch} samples of up to "
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
