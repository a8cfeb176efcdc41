"""The equality tests of packed sequences on this device, without pytest; on a GPU also what a step waits for."""

import time
import traceback
from collections.abc import Callable

import torch

from benchmarks.on_gpu.parts import Order
from raybert.errors import one_line
from raybert.model import optimizer
from raybert.train.step import train_step
from tests.unit import test_packed as packed

SLOWEST = "compiled"  # a name's part: comes last, so that the others have run when time is up


def run(order: Order) -> None:
    """Each test is a line; a part that is stopped leaves those that were done."""
    tests: dict[str, Callable[[], None]] = {name: it for name, it in vars(packed).items() if name.startswith("test_")}
    failed = 0
    if order.on_gpu:
        tests["no_wait_by_torch"] = lambda: no_wait(order)
    for name in sorted(tests, key=lambda name: SLOWEST in name):
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


def no_wait(order: Order) -> None:
    """A step on packed groups, kernel and fused optimizer included, under torch's own check for waits."""
    spec, objective = packed.OBJECTIVES[0]
    model = packed.pretraining(objective, dropout=0.1, hidden_size=128)
    parts = [packed.columns(4, seed) for seed in range(3)]
    groups = packed.packed_to_torch(parts, order.device, packed.packing_for(4, packed.T, spec))
    adam = optimizer.build(model.bert, **packed.ADAM)
    keys = {"lr": 1e-3, "grad_clip": 1.0, "seed": 0, "first_micro_batch": 0, "global_batch": 12, "dtype": order.dtype}
    train_step(model, adam, groups, step=0, **keys)
    order.wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(model, adam, groups, step=1, **keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
