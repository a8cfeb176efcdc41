"""Runs under fire: whatever happens to them, they train on what an undisturbed run trains on.

RAYBERT_FAULTS=N     how many faults, of the kinds in turn (in `make test` 3; `make test-faults` all; `make soak N=200`)
RAYBERT_FAULT_SEED   the moments, the victims; a failure names the seed that repeats it
"""

import os
import random

import pytest

from raybert.cli import run_app
from tests.data import make_shards
from tests.faults.cluster import ray_nodes
from tests.faults.driver import SEQ_LEN, STEPS, Driver, assert_undisturbed, losses, recomputed_digests
from tests.faults.scenarios import SCENARIOS

COUNT = int(os.environ.get("RAYBERT_FAULTS", "3"))
FIRST_SEED = int(os.environ.get("RAYBERT_FAULT_SEED", "0"))
CASES = [(list(SCENARIOS)[i % len(SCENARIOS)], FIRST_SEED + i) for i in range(COUNT)]

pytestmark = pytest.mark.timeout(290)


@pytest.fixture(scope="module")
def cluster():
    with ray_nodes(1, 1, 1) as found:
        yield found


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")), seq_len=SEQ_LEN, rows=700).uri


@pytest.fixture(scope="module")
def digests(shards):
    return recomputed_digests(shards, STEPS)


@pytest.fixture(scope="module")
def reference(cluster, shards, digests, tmp_path_factory):
    """Losses of an undisturbed run, on one worker."""
    driver = Driver.of(cluster, tmp_path_factory.mktemp("alone"), shards, "alone", train={"workers": 1})
    assert driver.wait() == 0, driver.said[-4000:]
    return losses(driver.uri)


@pytest.mark.parametrize(("name", "seed"), CASES, ids=[f"{name}-{seed}" for name, seed in CASES])
def test_nothing_is_lost(name, seed, cluster, shards, digests, reference, tmp_path, capsys):
    driver = Driver.of(cluster, tmp_path, shards, "run")
    try:
        SCENARIOS[name](driver, cluster, random.Random(seed))
        assert_undisturbed(driver, digests, reference)
    finally:
        if driver.process is not None and driver.process.poll() is None:
            driver.kill()
    assert run_app(["verify", driver.uri]) == 0, capsys.readouterr().out
