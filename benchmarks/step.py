"""Tokens per second of one optimizer step; beside it transformers' BertForPreTraining with the same batch and type.

The peer is the better of eager and torch.compile, in processes of its own. The limit is the rate at which this machine
multiplies matrices, divided by the step's FLOPs: its share is the MFU. `--sizes` goes through the five named sizes at
T = 128 and 512 beside the eager peer.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.common import clock, elsewhere, medians, result, seconds
from raybert.bench import OPTIMIZER, default_device, random_batch, stepper
from raybert.model.bert import Bert, flops_per_token
from raybert.model.config import BertConfig
from raybert.model.interop import to_transformers
from raybert.model.sizes import SIZES
from raybert.train import optimizer
from raybert.train.memory import keep_freed_memory
from raybert.train.peak import peak_flops
from raybert.train.precision import pick_dtype

SHAPES = ((4, 512), (16, 128))


def peer_side(size: str, samples: int, length: int, compiled: bool, tuned: bool = False) -> Callable[[], float]:
    """The same with transformers: head on every position, as its class has it; AdamW fused as ours.

    `tuned` is with the allocator's settings that our workers start with, which are no part of transformers.
    """
    if tuned:
        keep_freed_memory()
    device = default_device()
    torch.manual_seed(0)
    model = to_transformers(Bert(BertConfig(**SIZES[size]))).to(device).train()
    called: Any = torch.compile(model) if compiled else model
    adam = optimizer.build(model, **OPTIMIZER)
    batch, dtype = random_batch(samples, length, device), pick_dtype("auto", device)
    labels = torch.full_like(batch["input_ids"], -100).scatter(1, batch["masked_positions"], batch["masked_labels"])
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "next_sentence_label")}

    def work() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = called(**inputs, attention_mask=batch["attention_mask"].long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        loss.item()

    work()
    work()
    return lambda: samples * length / seconds(work)


def compare(size: str, samples: int, length: int, *, compiled: bool, rounds: int) -> dict[str, Any]:
    """Ours beside the peer at one shape."""
    ours = stepper(size, samples, length, clock=clock)
    ways = {"peer_eager": (False, False), "peer_tuned_allocator": (False, True)}
    if compiled:
        ways["peer_compiled"] = (True, False)
    with ExitStack() as stack:
        peers = [stack.enter_context(elsewhere(peer_side, size, samples, length, *way)) for way in ways.values()]
        first, *others = medians(ours, *peers, rounds=rounds)
    theirs = dict(zip(ways, others, strict=True))
    device = default_device()
    peak = peak_flops(device, pick_dtype("auto", device), seconds=1.0, clock=clock)
    limit = peak / flops_per_token(BertConfig(**SIZES[size]), length)
    peer = max(rate for way, rate in theirs.items() if way != "peer_tuned_allocator")
    found = {"size": size, "B": samples, "T": length, "ours": first, "peer": peer, **theirs}
    return found | {"ratio": first / peer, "limit": limit, "mfu": first / limit, "gemm_gflops": peak / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", action="store_true", help="every named size instead of the compact one")
    parser.add_argument("--eager", action="store_true", help="do not wait for the peer to compile")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.sizes:
        shapes = [(size, 2048 // length, length) for size in SIZES for length in (128, 512)]
    else:
        shapes = [("compact", samples, length) for samples, length in SHAPES]
    rows = []
    for size, samples, length in shapes:
        compiled = not (arguments.eager or arguments.sizes)
        rows.append(compare(size, samples, length, compiled=compiled, rounds=arguments.rounds))
        print(rows[-1], flush=True)
    first = next(row for row in rows if row["size"] == "compact")
    name = "step-sizes" if arguments.sizes else "step"
    dtype = str(pick_dtype("auto", default_device()))
    result(name, first["ours"], first["peer"], first["limit"], "tokens/s", dtype=dtype, rows=rows)


if __name__ == "__main__":
    main()
