"""Tokens per second of one optimizer step; beside it transformers' BertForPreTraining with the same batch and type.

The peer is the better of eager and torch.compile, each in a process of its own: both do two steps, and the faster one
is measured (with `--sizes` eager alone). The limit is the rate at which this machine multiplies matrices, divided by
the step's FLOPs: its share is the MFU. `--sizes` goes through the five named sizes, beside the eager peer at T=128 and
alone at 256 and 512; `--profile` says where our step's time goes.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.common import clock, elsewhere, machine, medians, result, round_figures, seconds
from raybert.bench import OPTIMIZER, default_device, random_columns, stepper
from raybert.data.tensors import to_torch
from raybert.model import optimizer
from raybert.model.bert import Bert, flops_per_token
from raybert.model.config import BertConfig
from raybert.model.interop import to_transformers
from raybert.model.peak import peak_flops
from raybert.model.precision import pick_dtype
from raybert.model.sizes import SIZES
from raybert.tokenizer import VOCAB_SIZE
from raybert.train.memory import tune_memory

SHAPES = ((4, 512), (16, 128))
ALSO = "-also"

# Of torch's operators, by the beginnings of their names.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "attention: softmax, dropout, layout": ("_MatmulAttention", "aten::_softmax", "aten::softmax"),
    "cross entropy beside its products": ("_TiedCrossEntropy",),
    "other dropout": ("_Dropout",),
    "optimizer": ("aten::_fused_adamw", "aten::_foreach", "Optimizer"),
    "GELU": ("aten::gelu",),
    "layer norm": ("aten::native_layer_norm",),
    "copies, casts, zeros": ("aten::copy_", "aten::cat", "aten::zero_", "aten::fill_", "aten::_to_copy", "aten::clone"),
}


def peer_side(size: str, samples: int, length: int, *, compiled: bool, tuned: bool = False) -> Callable[[], float]:
    """The same with transformers: head on every position, as its class has it; AdamW fused as ours.

    `tuned` is with the settings of memory that our workers start with, which are no part of transformers.
    """
    if tuned:
        tune_memory()
    device = default_device()
    torch.manual_seed(0)
    model = to_transformers(Bert(BertConfig(**SIZES[size]))).to(device).train()
    called: Any = torch.compile(model) if compiled else model
    adam = optimizer.build(model, **OPTIMIZER)
    batch, dtype = to_torch(random_columns(samples, length), device), pick_dtype("auto", device)
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
    return lambda: samples * length / seconds(work)


def step_tokens(size: str) -> int:
    """Of the largest size fewer, so that all of them take minutes."""
    return 512 if size == "base" else 2048


def gemm_rate() -> float:
    """FLOP/s of this moment; asked for before and after a measurement, since others may use the machine as well."""
    device = default_device()
    return peak_flops(device, pick_dtype("auto", device), seconds=0.5, clock=clock)


def compare(
    size: str, samples: int, length: int, ways: Mapping[str, Mapping[str, bool]], rounds: int
) -> dict[str, Any]:
    """Ours beside the peer at one shape.

    Args:
        ways: of the peer, and the options of `peer_side` that each one is. The fastest one is measured, and those
            whose name ends on `ALSO`.
    """
    peak = gemm_rate()
    with elsewhere(*(partial(peer_side, size, samples, length, **options) for options in ways.values())) as sides:
        # To choose among them; one alone only warms up.
        before = dict(zip(ways, medians(*sides, rounds=1), strict=True))
        best = max((name for name in ways if not name.endswith(ALSO)), key=lambda name: before[name])
        measured = {name: side for name, side in zip(ways, sides, strict=True) if name == best or name.endswith(ALSO)}
        first, *others = medians(stepper(size, samples, length, clock=clock), *measured.values(), rounds=rounds)
    theirs = dict(zip(measured, others, strict=True))
    peak = max(peak, gemm_rate())
    limit = peak / flops_per_token(BertConfig(**SIZES[size]), length)
    found = {"size": size, "B": samples, "T": length, "ours": first, "peer": theirs[best], "peer_is": best}
    found |= {"ratio": first / theirs[best], "limit": limit, "mfu": first / limit, "gemm_gflops": peak / 1e9}
    return found | {"peers_before": before} | {name: rate for name, rate in theirs.items() if name != best}


def measure(size: str, samples: int, length: int, rounds: int) -> dict[str, Any]:
    """Ours alone."""
    peak = gemm_rate()
    (rate,) = medians(stepper(size, samples, length, clock=clock), rounds=rounds)
    limit = max(peak, gemm_rate()) / flops_per_token(BertConfig(**SIZES[size]), length)
    return {"size": size, "B": samples, "T": length, "ours": rate, "limit": limit, "mfu": rate / limit}


def vocabularies(vocab_size: int, samples: int, length: int, rounds: int) -> dict[str, Any]:
    """Our compact step with another vocabulary beside the one with raybert's own."""
    peak = gemm_rate()
    sides = [stepper("compact", samples, length, vocab_size=rows, clock=clock) for rows in (vocab_size, VOCAB_SIZE)]
    first, second = medians(*sides, rounds=rounds)
    limit = max(peak, gemm_rate()) / flops_per_token(BertConfig(**SIZES["compact"], vocab_size=vocab_size), length)
    return {"vocab_size": vocab_size, "B": samples, "T": length, "ours": first, "peer": second, "limit": limit}


def profile(samples: int, length: int, steps: int = 3) -> dict[str, float]:
    """Shares of the compact step's time by kind of work, from torch's profiler."""
    work = stepper("compact", samples, length)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            work()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "the rest")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: spent[kind] / total for kind in sorted(spent, key=lambda kind: -spent[kind])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", action="store_true", help="every named size instead of the compact one; eager peer")
    parser.add_argument("--profile", action="store_true", help="where the time of our compact step goes")
    parser.add_argument("--tuned", action="store_true", help="also the peer with our workers' settings of memory")
    parser.add_argument("--vocab-size", type=int, help="our step with such a vocabulary beside raybert's own")
    parser.add_argument("--rounds", type=int, help="5; with --sizes 3")
    arguments = parser.parse_args()
    tune_memory()
    if arguments.profile:
        shares = {f"B={b} T={t}": round_figures(profile(b, t)) for b, t in SHAPES}
        print(json.dumps({"dtype": str(pick_dtype("auto", default_device())), "machine": machine(), **shares}))
        return
    if arguments.vocab_size:
        rows = [vocabularies(arguments.vocab_size, b, t, arguments.rounds or 5) for b, t in SHAPES]
        result("step-vocabulary", rows[0]["ours"], rows[0]["peer"], rows[0]["limit"], "tokens/s", rows=rows)
        return
    rows, ways = [], {"eager": {"compiled": False}}
    if arguments.sizes:
        shapes = [(size, step_tokens(size) // 128, 128) for size in SIZES]
        rounds = arguments.rounds or 3
    else:
        shapes, rounds = [("compact", samples, length) for samples, length in SHAPES], arguments.rounds or 5
        ways["compiled"] = {"compiled": True}
    if arguments.tuned:
        ways[f"tuned{ALSO}"] = {"compiled": False, "tuned": True}
    for size, samples, length in shapes:
        rows.append(compare(size, samples, length, ways, rounds))
        print(rows[-1], flush=True)
    if arguments.sizes:
        rows += [measure(size, step_tokens(size) // t, t, rounds) for size in SIZES for t in (256, 512)]
    first = next(row for row in rows if row["size"] == "compact")
    name = "step-sizes" if arguments.sizes else "step"
    dtype = str(pick_dtype("auto", default_device()))
    result(name, first["ours"], first["peer"], first["limit"], "tokens/s", dtype=dtype, rounds=rounds, rows=rows)


if __name__ == "__main__":
    main()
