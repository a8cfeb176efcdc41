"""The equality tests of packed sequences on this device, without pytest; on a GPU also what a step waits for."""

import time
import traceback
from collections.abc import Callable

import torch

from benchmarks.on_gpu.parts import Order
from benchmarks.on_gpu.recipes import Recipe, Trainer
from raybert.data.block import Columns
from raybert.errors import one_line
from raybert.model import compiler, varlen
from raybert.train import checkpoint
from raybert.train.checkpoint import Snapshot
from tests.unit import test_packed as packed

WAITS, SLOWEST = "no_wait", "compiled"  # parts of names: come last, so that the others have run when time is up


def run(order: Order) -> None:
    """Each test is a line; a part that is stopped leaves those that were done."""
    tests: dict[str, Callable[[], None]] = {name: it for name, it in vars(packed).items() if name.startswith("test_")}
    failed = 0
    if order.on_gpu:
        tests["no_wait_by_torch"] = lambda: no_wait(order)
        if torch.cuda.get_device_capability(order.device) >= varlen.CAPABILITY:
            tests["the_kernel_and_the_compiler_can_be_used"] = lambda: nothing_is_missing(order)
    names = sorted(tests, key=lambda name: (WAITS in name, SLOWEST in name))
    order.tell(planned=names)  # so that those which time did not allow are known
    for name in names:
        start, error = time.perf_counter(), ""
        try:
            tests[name]()
        except Exception as fault:
            failed += 1
            error = f"{type(fault).__name__}: {one_line(fault)[:300]}"
            traceback.print_exc()
        found = {"test": name, "ok": not error, "seconds": time.perf_counter() - start}
        order.tell(**found, **({"error": error} if error else {}))
    order.tell(tests=len(tests), failed=failed)


def nothing_is_missing(order: Order) -> None:
    """On a card that has the kernel. Without it, or without a compiler, all other parts run, but slowly."""
    missing = [varlen.why_not(order.device, torch.bfloat16, 64), compiler.why_not(order.device)]
    assert not any(missing), "; ".join(reason for reason in missing if reason)


def no_wait(order: Order) -> None:
    """The trainer's steps of both objectives under torch's own check for waits.

    Compiled or not as the trainer does it; the feed, the fused optimizer and a snapshot between two steps included.
    """
    for spec, objective in packed.OBJECTIVES:
        recipe = Recipe("tiny", packed.T, micro_batch=4, global_batch=12, objective=objective, spec=spec)
        trainer = Trainer(recipe, order.device, order.dtype)
        gate = checkpoint.Gate(trainer.adam)
        parts = [packed.columns(4, seed) for seed in range(3)]

        def steps(trainer: Trainer = trainer, gate: checkpoint.Gate = gate, parts: list[Columns] = parts) -> Snapshot:
            trainer.train(parts)
            snap = checkpoint.snapshot(trainer.model, trainer.adam, step=trainer.step)
            gate.hold(snap)
            trainer.train(parts)
            return snap

        trainer.warm_up(parts)
        steps().wait()  # what is made once is made here: streams, moments, pinned memory
        order.wait()
        if order.on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            snap = steps()
        finally:
            if order.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        snap.wait()
        assert trainer.step == 4
