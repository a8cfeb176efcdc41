"""Tokens per second of steps on short documents in long rows; beside it the same number of tokens as full windows.

The documents have the lengths of AG News texts (about 55 tokens with [CLS] and [SEP]) and are padded to T=512. Both
sides are the compact model and train on about 2,048 real tokens a step; the limit is the side without padding.
"""

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.common import DATA, clock, medians, result, seconds
from raybert.bench import OPTIMIZER, default_device, random_batch, stepper
from raybert.model import optimizer
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.losses import Pretraining
from raybert.model.precision import pick_dtype
from raybert.tokenizer import Tokenizer
from raybert.train.memory import keep_freed_memory
from raybert.train.step import train_step

B, T = 4, 512


def micro_batches(tokens: int) -> list[dict[str, Tensor]]:
    """Micro-batches of B padded samples, with real lengths in the order of the file, up to `tokens` in all."""
    texts = pq.read_table(DATA / "ag_news" / "ag_news_train.parquet", columns=["text"])["text"].to_pylist()[:400]
    lengths = [min(len(ids) + 3, T) for ids in Tokenizer().encode_batch(texts)]
    count = int(np.searchsorted(np.cumsum(lengths), tokens)) // B * B
    parts = []
    for first in range(0, count, B):
        batch = random_batch(B, T, default_device())
        length = torch.tensor(lengths[first : first + B], device=default_device())[:, None]
        real = torch.arange(T, device=default_device()) < length
        # A fifteenth in a hundred of each text, spread evenly; the rest of the row holds no position.
        places = torch.arange(batch["masked_positions"].shape[1], device=default_device())
        positions = (places / 0.15).long() + 1
        batch["masked_positions"] = torch.where(positions < length - 1, positions, -1)
        batch["attention_mask"] = real
        parts.append(batch)
    return parts


def main() -> None:
    keep_freed_memory()
    device = default_device()
    torch.manual_seed(0)
    model = Bert(BertConfig()).to(device)
    pretraining, adam = Pretraining(model), optimizer.build(model, **OPTIMIZER)
    parts = micro_batches(B * T)
    tokens = sum(int(part["attention_mask"].sum()) for part in parts)
    dtype, step = pick_dtype("auto", device), 0

    def work() -> None:
        nonlocal step
        keys = {"seed": 0, "step": step, "first_micro_batch": 0, "global_batch": B * len(parts)}
        train_step(pretraining, adam, parts, lr=1e-4, grad_clip=1.0, dtype=dtype, **keys)[0].sum().item()
        step += 1

    work()
    work()
    first, second = medians(lambda: tokens / seconds(work), stepper("compact", B, T, clock=clock), rounds=5)
    extra = {"documents": B * len(parts), "tokens": tokens, "padded_to": T, "dtype": str(dtype)}
    result("padding", first, second, second, "real tokens/s", **extra)


if __name__ == "__main__":
    main()
