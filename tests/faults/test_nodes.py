"""Nodes that come and go: an elastic run follows them, and a node that is told of its end is left in good order."""

import os
import signal
import sys

import pytest

from raybert.train import ledger
from tests.data import make_shards
from tests.faults.cluster import ray_nodes
from tests.faults.driver import SEQ_LEN, Driver, assert_undisturbed, recomputed_digests
from tests.faults.scenarios import WORKER

pytestmark = [
    pytest.mark.timeout(290),
    pytest.mark.skipif(int(os.environ.get("RAYBERT_FAULTS", "3")) < 10, reason="`make test-faults` does this"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")), seq_len=SEQ_LEN, rows=700).uri


def test_an_elastic_run_grows_and_shrinks(shards, tmp_path):
    """1 worker, 2 when a node comes, 1 when a node is lost: the same samples, and no step is lost by growing."""
    train = {"steps": 100_000, "workers": [1, 3], "resize_seconds": 3}
    with ray_nodes(1, 1) as cluster:
        driver = Driver.of(cluster, tmp_path, shards, "run", train=train, every={"log": 5, "checkpoint": 20})

        def attempts():
            return ledger.read_account(driver.uri).attempts

        driver.wait_for_step(10)
        new = cluster.add(1)
        driver.wait_for("more workers", lambda: attempts()[-1].workers == 2, 150)
        driver.wait_for_step(driver.step() + 10)
        (new if new.pids(WORKER) else cluster.nodes[1]).lose()
        driver.wait_for("fewer workers", lambda: attempts()[-1].workers == 1, 150)
        assert driver.process is not None
        driver.process.send_signal(signal.SIGINT)
        assert driver.process.wait(60) == 130, driver.said[-3000:]
        first, second, *_ = attempts()
        digests = ledger.read_account(driver.uri).digests.tolist()
    assert (first.workers, second.workers) == (1, 2)
    assert first.last - second.restored < 20, "steps behind a checkpoint were thrown away to grow"
    assert digests == recomputed_digests(shards, len(digests))
    assert next(fault["workers"] for fault in driver.faults("resize")) == 2


def test_a_preempted_node_is_left_with_everything_saved(shards, tmp_path):
    """SIGTERM to a node that `raybert.node` runs: the run saves, starts again elsewhere and repeats no step."""
    with ray_nodes(1) as cluster:
        told = [cluster.add(1, command=[sys.executable, "-m", "raybert.node"]) for _ in range(2)]
        driver = Driver.of(cluster, tmp_path, shards, "run", train={"steps": 240}, every={"checkpoint": 1000})
        driver.wait_for_step(30)
        victim = next(node for node in told if node.pids(WORKER))
        victim.process.send_signal(signal.SIGTERM)
        driver.wait_for("the group's end", lambda: driver.faults("preempted"))
        victim.process.wait(60)
        victim.gone = True
        cluster.add(1)
        assert_undisturbed(driver, recomputed_digests(shards, 240))
        first, second = ledger.read_account(driver.uri).attempts
    assert second.restored == first.last, "steps were lost"
