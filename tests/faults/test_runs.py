"""Runs under fire: whatever happens to them, they train on what an undisturbed run trains on.

Several faults are done to each run, one after the other, each in a stretch of steps of its own.

RAYBERT_FAULTS=N     how many faults: a draw from the kinds, and more than there are kinds go round (in `make test` 2;
                     `make test-faults` 3; `make soak N=200`)
RAYBERT_FAULT_SEED   the draw, the moments, the victims, the number of workers, disk or bucket; a failure names the seed
"""

import os
import random
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from raybert.cli import run_app
from raybert.train.recovery.repair import incomplete_checkpoints
from tests.clusters import cluster as ray_nodes
from tests.data import make_shards
from tests.faults.driver import SEQ_LEN, STRETCH, Driver, assert_undisturbed, plain_losses, recomputed_digests
from tests.faults.scenarios import SCENARIOS

COUNT = int(os.environ.get("RAYBERT_FAULTS", "2"))
SEED = int(os.environ.get("RAYBERT_FAULT_SEED", "0"))
A_RUN = 3  # faults
DRAWN = sorted(random.Random(SEED).sample(range(len(SCENARIOS)), min(COUNT, len(SCENARIOS))))
NAMES = [list(SCENARIOS)[DRAWN[i % len(DRAWN)]] for i in range(COUNT)]
CASES = [NAMES[i : i + A_RUN] for i in range(0, COUNT, A_RUN)]

# On a busy machine a worker that is well may be without progress for longer than a worker on an idle one.
HANG = {"hang_seconds": 90, "hang_factor": 20}


@pytest.fixture(scope="module")
def cluster(gcs):
    with ray_nodes(2, 2, 2) as found, small_disk(found.temporary):
        yield found


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")), seq_len=SEQ_LEN, rows=700).uri


@pytest.fixture(scope="module")
def bucket(gcs):
    """A bucket with the same shards in it."""
    uri = gcs.create_bucket("faults")
    make_shards(f"{uri}/shards", seq_len=SEQ_LEN, rows=700)
    return uri


@pytest.mark.parametrize(("number", "names"), list(enumerate(CASES)), ids=["-".join(names) for names in CASES])
def test_nothing_is_lost(number, names, cluster, shards, gcs, bucket, tmp_path, capsys):
    rng, steps = random.Random(SEED + number), STRETCH * (len(names) + 1)
    place = random.Random(f"place {SEED + number}")
    workers, in_bucket = place.choice((1, 2, 3, 6)), place.random() < 0.5
    with small_disk(tmp_path / "disk") as folder:
        train = {"steps": steps, "workers": workers, **HANG}
        if in_bucket:
            run = {"storage": f"{bucket}/{number}"}
            driver = Driver.of(cluster, folder, f"{bucket}/shards", "run", gcs=gcs, run=run, train=train)
        else:
            driver = Driver.of(cluster, folder, shards, "run", train=train)
        try:
            for i, name in enumerate(names):
                print(f"seed {SEED + number}, {workers} workers, {driver.uri}: {name} from step {STRETCH * i}")
                driver.stretch = STRETCH * i + STRETCH // 2
                SCENARIOS[name](driver, cluster, rng)
            assert_undisturbed(driver, recomputed_digests(shards, steps), plain_losses(shards, steps))
        finally:
            if driver.process is not None and driver.process.poll() is None:
                driver.kill()
            gcs.inject()
            for path in cluster.temporary.glob("raybert-*"):  # what processes that were killed have left, for ever
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
        assert not incomplete_checkpoints(driver.uri)
        assert run_app(["verify", driver.uri]) == 0, capsys.readouterr().out


@contextmanager
def small_disk(folder):
    """A file system for a few checkpoints, which can be filled; the folder itself for who may not mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "raybert-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
