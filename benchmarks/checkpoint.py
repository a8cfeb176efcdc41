"""Seconds that a full checkpoint holds up the step; beside it the blocking way: torch.save, then a copy to storage.

Ours copies weights and optimizer state within main memory and writes in the background. The limit is one copy of as
many bytes into memory that the process has already.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import medians, result, seconds
from raybert.model import optimizer
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.losses import Pretraining
from raybert.model.sizes import SIZES
from raybert.train import checkpoint
from raybert.train.memory import tune_memory


def measure(size: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Bert(BertConfig(**SIZES[size]))
    pretraining = Pretraining(model)
    adam = optimizer.build(model, lr=1e-4, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-6)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad(set_to_none=True)
    sources = [parameter.detach() for parameter in model.parameters()] * 3
    targets = [torch.empty_like(source).copy_(source) for source in sources]

    with tempfile.TemporaryDirectory() as folder:

        def ours() -> float:
            """What the loop does at a checkpoint; the writing itself is waited for afterwards, off the clock."""
            writer, start = checkpoint.BackgroundWriter(), time.perf_counter()
            snap = checkpoint.snapshot(pretraining, adam, step=1)
            writer.submit(lambda: checkpoint.write(snap, f"{folder}/ours"))
            held = time.perf_counter() - start
            writer.close()
            return held

        def blocking() -> None:
            local = Path(folder, "blocking.pt")
            torch.save({"model": model.state_dict(), "optimizer": adam.state_dict()}, local)
            shutil.copyfile(local, Path(folder, "uploaded.pt"))

        def copy() -> None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

        ours()
        held, blocked, limit = medians(ours, lambda: seconds(blocking), lambda: seconds(copy), rounds=rounds)
    size_bytes = sum(source.numel() * source.element_size() for source in sources)
    return {
        "size": size,
        "held": held,
        "blocking": blocked,
        "share": held / blocked,
        "copy": limit,
        "bytes": size_bytes,
    }


def main() -> None:
    tune_memory()
    rows = [measure("compact", rounds=5), measure("base", rounds=3)]
    first = rows[0]
    result("checkpoint", first["held"], first["blocking"], first["copy"], "s (less is better)", rows=rows)


if __name__ == "__main__":
    main()
