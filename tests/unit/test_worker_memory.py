"""The memory of a process that trains on a CPU does not grow with the number of shapes that it has seen."""

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from benchmarks.common import elsewhere
from raybert.train.memory import FEW_PLANS, WORKER_ENVIRONMENT, tune_memory, worker_environment

# MB that are in use after 100 products of different shapes, and after 300 more.
PRODUCTS = """
import ctypes
import torch
from raybert.train.memory import tune_memory

if {called}:
    tune_memory()


class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena free1 free2 maps mapped peak fast used free top".split()]


counts = ctypes.CDLL(None).mallinfo2
counts.restype = Counts
layer = torch.nn.Linear(256, 512, dtype=torch.bfloat16)
for rows in range(100, 500):
    layer(torch.ones(rows, 256, dtype=torch.bfloat16)).sum().backward()
    if rows in (199, 499):
        print(counts().used / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc for its counts")
@pytest.mark.parametrize("called", [False, True], ids=["environment of workers", "call"])
def test_plans_of_products_do_not_accumulate(called):
    environment = {name: value for name, value in os.environ.items() if name not in WORKER_ENVIRONMENT}
    environment |= {} if called else WORKER_ENVIRONMENT
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS.format(called=called)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, last = map(float, done.stdout.split())
    assert last - first < 2.0


def test_a_value_that_was_set_where_the_run_is_started_wins(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    assert worker_environment(on_gpu=False) == WORKER_ENVIRONMENT | {"LRU_CACHE_CAPACITY": "7"}
    assert worker_environment(on_gpu=True) == {}
    assert FEW_PLANS.items() <= WORKER_ENVIRONMENT.items()


def kept_plans() -> Callable[[], float]:
    return lambda: float(os.environ.get("LRU_CACHE_CAPACITY", "nan"))


def tuned_plans() -> Callable[[], float]:
    tune_memory()
    return kept_plans()


def test_a_benchmarks_peer_does_not_have_our_settings(monkeypatch):
    for name, value in FEW_PLANS.items():  # as `tune_memory` leaves them
        monkeypatch.setenv(name, value)
    with elsewhere(kept_plans, tuned_plans, warm=False) as (peer, ours):
        assert math.isnan(peer())
        assert ours() == float(FEW_PLANS["LRU_CACHE_CAPACITY"])
