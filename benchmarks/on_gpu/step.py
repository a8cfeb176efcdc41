"""Real tokens per second of one optimizer step; beside it transformers' BertForPreTraining on the same samples.

The samples are windows of real text, so a part of the places of a padded batch is padding. Both sides have
bfloat16 autocast and fused AdamW; ours is as in a run, compiled where that works; the peer has SDPA, eager and
compiled, of which the faster one counts. MFU is of real tokens: what their operations would take at the measured rate
of products. A side that fails has the reason in the place of a figure. The shapes come one after the other, all sides
of each, since time may end the part. Each figure is a line as it comes; the newest line of both sides of a shape holds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.on_gpu.carried import WindowReader
from benchmarks.on_gpu.parts import Order, fresh, timed
from benchmarks.on_gpu.recipes import ADAM, ORIGINAL, Recipe, Trainer, micro_batches, require_finite
from raybert.data.block import Columns
from raybert.data.tensors import to_torch
from raybert.errors import one_line
from raybert.model import compiler, optimizer
from raybert.model.bert import Bert, flops_per_token
from raybert.model.interop import to_transformers
from raybert.model.peak import peak_flops

# Places of a micro-batch, padding included, on cards with so many GB at least; the peer's logits take 400 kB of each.
PLACES = {40.0: 32_768, 20.0: 16_384, 0.0: 4096}
MICRO_BATCHES = 16  # of a step, as `ORIGINAL` has
SHAPES = (("compact", 512), ("base", 512), ("compact", 128), ("base", 128))
CPU_SHAPES = (("tiny", 128), ("mini", 128))  # to see that all of it runs
STEPS = 2  # of different samples, which are gone through again and again
MOST_STEPS, MOST_SECONDS = 40, 4.0
LEAST_LEFT = {"eager": 8.0, "compiled": 40.0}  # seconds of the part that a side is begun with


@dataclass(frozen=True)
class Shape:
    """A recipe, and the samples of some of its steps."""

    recipe: Recipe
    steps: list[list[Columns]]

    @property
    def named(self) -> dict[str, Any]:
        return {"size": self.recipe.size, "T": self.recipe.seq_len, "B": self.recipe.micro_batch}

    def about(self, peak: float) -> dict[str, float]:
        """How full rows are, and the tokens/s at which real tokens' operations take the measured rate of products."""
        lengths = np.concatenate([part["length"] for parts in self.steps for part in parts]).astype(np.float64)
        masked = sum(int((part["masked_positions"] >= 0).sum()) for parts in self.steps for part in parts)
        # Attention's operations grow with the square of a length, so the mean length would be too short.
        length = round((lengths**2).sum() / lengths.sum())
        flops = flops_per_token(self.recipe.bert(), length, masked / lengths.sum())
        filled = lengths.mean() / self.recipe.seq_len
        return {"rows_filled": filled, "limit": peak / flops, "gflops_per_token": flops / 1e9}


Step = Callable[[list[Columns]], Tensor]  # returns a loss of it, or sums of which one comes first
# And its warm-up, and how full the groups were that it packed.
Side = tuple[Step, Callable[[list[Columns]], object], Callable[[], dict[str, float]]]


def run(order: Order) -> None:
    peak = peak_flops(order.device, order.dtype, seconds=0.5)
    order.tell(gemm_tflops=peak / 1e12, dtype=str(order.dtype))
    shapes = shapes_of(order)
    abouts = [{**shape.named, **shape.about(peak)} for shape in shapes]
    for about in abouts:  # so that those which time did not allow are known
        order.tell(**about)
    compiles = False
    if order.on_gpu:
        uncompiled = compiler.why_not(order.device)
        compiles = not uncompiled
        if uncompiled:
            order.tell(note=uncompiled)
    ours = "compiled" if compiles else "eager"
    sides = [("ours", ours), ("peer", "eager"), *([("peer", "compiled")] if compiles else [])]
    for number, (shape, about) in enumerate(zip(shapes, abouts, strict=True)):
        rates: dict[str, dict[str, float]] = {}
        for place, (side, way) in enumerate(sides):
            if order.left < (LEAST_LEFT[way] if order.on_gpu else 1):
                order.tell(side=side, way=way, **shape.named, left_out="the part's time is up")
                continue
            make = partial(SIDES[side], order, shape.recipe, compiles=way == "compiled")
            share = order.left / (len(sides) * (len(shapes) - number) - place)
            found = measure(order, make, shape, share)
            order.tell(side=side, way=way, **shape.named, **found)
            if "tokens_per_second" in found:
                rates.setdefault(side, {})[way] = found["tokens_per_second"]
            # Again for each side, since time may end it.
            order.tell(**about, **compared(rates, about["limit"]))


def shapes_of(order: Order) -> list[Shape]:
    windows, cut = order.load().windows, {}
    shapes, places = [], 512
    if order.on_gpu:
        memory = torch.cuda.get_device_properties(order.device).total_memory / 1e9
        places = next(places for least, places in PLACES.items() if memory >= least)
    for size, seq_len in SHAPES if order.on_gpu else CPU_SHAPES:
        if seq_len not in cut:
            whole = seq_len == windows.seq_len
            cut[seq_len] = windows if whole else windows.cut(seq_len, 20_000 if order.on_gpu else 500)
        micro_batch = places // seq_len
        batch = (MICRO_BATCHES if order.on_gpu else 1) * micro_batch  # a CPU takes seconds for the peer's
        recipe = replace(ORIGINAL, size=size, seq_len=seq_len, micro_batch=micro_batch, global_batch=batch)
        reader = WindowReader(cut[seq_len])
        shapes.append(
            Shape(recipe, [micro_batches(reader, recipe, step) for step in range(STEPS if order.on_gpu else 1)])
        )
    return shapes


def compared(rates: dict[str, dict[str, float]], limit: float) -> dict[str, Any]:
    """The faster way of each side of a shape, and their ratio; what was not measured is left out.

    `peer_ways` says what the peer was measured with so far.
    """
    found: dict[str, Any] = {}
    for side, ways in rates.items():
        way = max(ways, key=lambda name: ways[name])
        found |= {side: ways[way], f"{side}_is": way}
    if "ours" in found:
        found["mfu"] = found["ours"] / limit
        if "peer" in found:
            found |= {"ratio": found["ours"] / found["peer"], "peer_ways": list(rates["peer"])}
    return found


def measure(order: Order, make: Callable[[], Side], shape: Shape, seconds: float) -> dict[str, Any]:
    """Tokens per second after a step that is not counted, the seconds of that and the warm-up (compiling), and peak
    memory; in so many seconds with all that, if compiling leaves some."""
    fresh(order)
    begun = time.perf_counter()
    try:
        step, warm_up, lap = make()
        compile_s = timed(lambda: warm_up(shape.steps[0]), order) + timed(lambda: step(shape.steps[0]), order)
        loss = torch.zeros(1)
        left = min(MOST_SECONDS, max(0.5, seconds - (time.perf_counter() - begun)))
        now, tokens, count, start = order.mark(), 0, 0, time.perf_counter()
        while count < MOST_STEPS and time.perf_counter() - start < left:
            parts = shape.steps[count % len(shape.steps)]
            loss = step(parts)
            tokens += sum(int(part["length"].sum()) for part in parts)
            count += 1
            before, now = now, order.mark()
            order.wait(before)  # the host is one step ahead, as in a run
        order.wait()
        spent = time.perf_counter() - start
        require_finite(loss)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {one_line(error)[:120]}"}
    except Exception as error:  # the other side and the other shapes are worth having all the same
        return {"failed": f"{type(error).__name__}: {one_line(error)[:300]}"}
    found: dict[str, Any] = {"tokens_per_second": tokens / spent, "compile_s": compile_s, "steps": count, **lap()}
    if order.on_gpu:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def our_side(order: Order, recipe: Recipe, *, compiles: bool) -> Side:
    trainer = Trainer(recipe, order.device, order.dtype, compiles=compiles)
    if trainer.notes:
        order.tell(side="ours", notes=trainer.notes)

    return trainer.train, trainer.warm_up, trainer.feed.lap


def peer_side(order: Order, recipe: Recipe, *, compiles: bool) -> Side:
    """The same samples, padded to T; head on every position, as its class has it."""
    torch.manual_seed(0)
    model = to_transformers(Bert(recipe.bert())).to(order.device).train()
    called: Any = torch.compile(model, dynamic=False) if compiles else model
    adam = optimizer.build(model, lr=recipe.lr, **ADAM)

    def step(parts: list[Columns]) -> Tensor:
        for part in parts:
            batch = to_torch(part, order.device)
            # A position for every place of masked_positions, -1 among them at a column that is dropped.
            labels = torch.full((len(batch["input_ids"]), recipe.seq_len + 1), -100, device=order.device)
            at = batch["masked_positions"].where(batch["masked_positions"] >= 0, recipe.seq_len)
            labels = labels.scatter(1, at, batch["masked_labels"])[:, : recipe.seq_len].contiguous()
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
        return cast(Tensor, loss.detach())

    return step, lambda parts: step(parts[:1]), dict


SIDES: dict[str, Callable[..., Side]] = {"ours": our_side, "peer": peer_side}
