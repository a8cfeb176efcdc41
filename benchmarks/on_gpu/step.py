"""Real tokens per second of one optimizer step; beside it transformers' BertForPreTraining on the same samples.

The samples are windows of real text, so about half of the places of a padded batch are padding. The peer is at its
best: SDPA, bfloat16 autocast, fused AdamW, eager or compiled, whichever is faster. MFU is of real tokens: what their
operations would take at the measured rate of products. Both are given up with the reason where memory runs out.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.on_gpu.carried import WindowReader, Windows
from benchmarks.on_gpu.parts import Order, timed
from benchmarks.on_gpu.recipes import ADAM, ORIGINAL, Recipe, Trainer, micro_batches
from raybert.data.block import Columns
from raybert.data.tensors import to_torch
from raybert.errors import one_line
from raybert.model import optimizer
from raybert.model.bert import Bert, flops_per_token
from raybert.model.interop import to_transformers
from raybert.model.peak import peak_flops

PLACES = {"compact": 32_768, "base": 32_768}  # of a micro-batch, padding included
SHAPES = (("compact", 512), ("base", 512), ("compact", 128), ("base", 128))
CPU_SHAPES = (("tiny", 128), ("mini", 128))  # to see that all of it runs
STEPS = 4  # of different samples, which are gone through again and again
MOST_STEPS, MOST_SECONDS = 40, 5.0
LEAST_LEFT = 25.0  # seconds of the part that a shape is begun with


def run(order: Order) -> None:
    windows = order.load().windows
    peak = peak_flops(order.device, order.dtype, seconds=0.5)
    order.tell(gemm_tflops=peak / 1e12, dtype=str(order.dtype))
    short: Windows | None = None
    for size, seq_len in SHAPES if order.on_gpu else CPU_SHAPES:
        if order.left < (LEAST_LEFT if order.on_gpu else 2):
            order.tell(size=size, T=seq_len, left_out="the part's time is up")
            continue
        if seq_len < windows.seq_len and short is None:
            short = windows.cut(seq_len, 20_000 if order.on_gpu else 500)
        micro_batch = (PLACES[size] if order.on_gpu else 1024) // seq_len
        recipe = replace(
            ORIGINAL, size=size, seq_len=seq_len, micro_batch=micro_batch, global_batch=4 * micro_batch, steps=10_000
        )
        reader = WindowReader(windows if seq_len == windows.seq_len else short or windows)
        order.tell(**compare(order, recipe, [micro_batches(reader, recipe, step) for step in range(STEPS)], peak))


def compare(order: Order, recipe: Recipe, steps: list[list[Columns]], peak: float) -> dict[str, Any]:
    """One shape. A side that fails has its reason in the place of a figure."""
    found: dict[str, Any] = {"size": recipe.size, "T": recipe.seq_len, "B": recipe.micro_batch}
    lengths = np.concatenate([part["length"] for parts in steps for part in parts]).astype(np.float64)
    masked = sum(int((part["masked_positions"] >= 0).sum()) for parts in steps for part in parts)
    found["filled"] = lengths.mean() / recipe.seq_len
    found |= _side("ours", order, partial(our_side, order, recipe), steps)
    ways = {"eager": False} | ({"compiled": True} if order.on_gpu else {})
    for name, compiled in ways.items():
        if order.left > 5:
            found |= _side(name, order, partial(peer_side, order, recipe, compiled=compiled), steps)
    rates = {name: found[name] for name in ways if isinstance(found.get(name), float)}
    if rates and isinstance(found["ours"], float):
        found["peer_is"] = best = max(rates, key=lambda name: rates[name])
        found |= {"peer": rates[best], "ratio": found["ours"] / rates[best]}
    # Attention's operations grow with the square of a length, so the mean length would be too short.
    length = round((lengths**2).sum() / lengths.sum())
    flops = flops_per_token(recipe.bert(), length, masked / lengths.sum())
    found |= {"limit": peak / flops, "gflops_per_token": flops / 1e9}
    if isinstance(found["ours"], float):
        found["mfu"] = found["ours"] / found["limit"]
    return found


def _side(name: str, order: Order, make: Callable[[], Callable[[list[Columns]], None]], steps: Any) -> dict[str, Any]:
    """Tokens per second, seconds until the first steps are through (compiling), and peak memory."""
    if order.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        step = make()
        warm = timed(lambda: [step(parts) for parts in steps], order)
        tokens, count, start = 0, 0, time.perf_counter()
        while count < MOST_STEPS and time.perf_counter() - start < min(MOST_SECONDS, max(1.0, order.left / 4)):
            for parts in steps:
                step(parts)
                tokens += sum(int(part["length"].sum()) for part in parts)
                count += 1
            order.wait()
        spent = time.perf_counter() - start
    except torch.OutOfMemoryError as error:
        return {name: f"out of memory: {one_line(error)[:120]}"}
    except Exception as error:  # the other side and the other shapes are worth having all the same
        return {name: f"failed: {type(error).__name__}: {one_line(error)[:300]}"}
    found: dict[str, Any] = {name: tokens / spent, f"{name}_warm_up_s": warm, f"{name}_steps": count}
    if order.on_gpu:
        found[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def our_side(order: Order, recipe: Recipe) -> Callable[[list[Columns]], None]:
    trainer = Trainer(recipe, order.device, order.dtype)
    if trainer.fallback:
        order.tell(note=trainer.fallback)

    def step(parts: list[Columns]) -> None:
        trainer.train(parts)

    return step


def peer_side(order: Order, recipe: Recipe, *, compiled: bool) -> Callable[[list[Columns]], None]:
    """The same samples, padded to T; head on every position, as its class has it."""
    torch.manual_seed(0)
    model = to_transformers(Bert(recipe.bert())).to(order.device).train()
    called: Any = torch.compile(model, dynamic=False) if compiled else model
    adam = optimizer.build(model, lr=recipe.lr, **ADAM)

    def step(parts: list[Columns]) -> None:
        for part in parts:
            batch = to_torch(part, order.device)
            # A position for every place of masked_positions, -1 among them at a column that is dropped.
            labels = torch.full((len(batch["input_ids"]), recipe.seq_len + 1), -100, device=order.device)
            at = batch["masked_positions"].where(batch["masked_positions"] >= 0, recipe.seq_len)
            labels = labels.scatter(1, at, batch["masked_labels"])[:, : recipe.seq_len]
            with torch.autocast(order.device.type, order.dtype, enabled=order.dtype != torch.float32):
                loss = called(
                    input_ids=batch["input_ids"],
                    token_type_ids=batch["token_type_ids"],
                    attention_mask=batch["attention_mask"].long(),
                    labels=labels,
                    next_sentence_label=batch["next_sentence_label"],
                ).loss
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step
