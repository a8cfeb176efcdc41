"""A bucket that answers nothing for a while, under a run that reads from it and writes to it."""

import os
import time

import pytest

from raybert import storage
from raybert.cli import run_app
from tests.clusters import cluster as ray_nodes
from tests.data import make_shards
from tests.faults.driver import SEQ_LEN, Driver, assert_undisturbed, plain_losses, recomputed_digests
from tests.gcs import Fault

STEPS = 120

pytestmark = pytest.mark.skipif("RAYBERT_SLOW" not in os.environ, reason="`make test-faults` does this")


def test_a_run_waits_until_the_bucket_is_back(gcs, tmp_path):
    bucket = gcs.create_bucket("outage")
    local, _ = (make_shards(uri, seq_len=SEQ_LEN, rows=700) for uri in (f"{tmp_path}/shards", f"{bucket}/shards"))
    with ray_nodes(3) as cluster:
        run = {"storage": f"{bucket}/runs"}
        driver = Driver.of(cluster, tmp_path, f"{bucket}/shards", "run", run=run, train={"steps": STEPS})
        # The log of a remote run is uploaded now and then, so a checkpoint is what tells that it goes.
        driver.wait_for("a checkpoint", lambda: storage.list_dir(f"{driver.uri}/checkpoints"))
        gcs.inject(Fault("status", every=1, status=503))
        time.sleep(float(os.environ.get("RAYBERT_OUTAGE_S", "60")))
        driver.wait_for("requests to the bucket", lambda: sum(gcs.injected().values()) > 3)
        gcs.inject()
        assert_undisturbed(driver, recomputed_digests(local.uri, STEPS), plain_losses(local.uri, STEPS))
    assert run_app(["verify", driver.uri]) == 0
