"""Runs under fire: whatever happens to them, they train on what an undisturbed run trains on.

RAYBERT_FAULTS=N     how many faults, of the kinds in turn (in `make test` 3; `make test-faults` all; `make soak N=200`)
RAYBERT_FAULT_SEED   the moments, the victims; a failure names the seed that repeats it
"""

import os
import random
import subprocess
from contextlib import contextmanager, nullcontext

import pytest

from raybert.cli import run_app
from tests.data import make_shards
from tests.faults.cluster import ray_nodes
from tests.faults.driver import SEQ_LEN, STEPS, Driver, assert_undisturbed, losses, recomputed_digests
from tests.faults.scenarios import SCENARIOS, SECTIONS, SMALL_DISK

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
    with small_disk(tmp_path / "disk") if name in SMALL_DISK else nullcontext(tmp_path) as folder:
        under_fire(name, seed, cluster, shards, digests, reference, folder)
        assert run_app(["verify", f"{folder}/run"]) == 0, capsys.readouterr().out


@contextmanager
def small_disk(folder):
    """A file system of a few checkpoints' size."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "raybert-test", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system to fill")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def under_fire(name, seed, cluster, shards, digests, reference, folder):
    driver = Driver.of(cluster, folder, shards, "run", **SECTIONS.get(name, {}))
    try:
        SCENARIOS[name](driver, cluster, random.Random(seed))
        assert_undisturbed(driver, digests, reference)
    finally:
        if driver.process is not None and driver.process.poll() is None:
            driver.kill()
