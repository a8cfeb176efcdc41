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

STEPS = 400


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")), seq_len=SEQ_LEN, rows=700).uri


def test_an_elastic_run_shrinks_and_grows(shards, tmp_path):
    """1 worker, 2 when a node comes, 1 when a node is lost: the same samples, and no step is lost by growing."""
    model = {"hidden_size": 32, "num_hidden_layers": 6}
    train = {"steps": STEPS, "workers": [1, 3], "resize_seconds": 3}
    with ray_nodes(1, 1) as cluster:
        driver = Driver.of(cluster, tmp_path, shards, "run", train=train, model=_with(model), every={"checkpoint": 20})
        driver.wait_for_step(10)
        new = cluster.add(1)
        (grown,) = driver.wait_for("more workers", lambda: driver.faults("resize"), 200)
        assert grown["workers"] == 2
        driver.wait_for("two starts", lambda: len(ledger.read_account(driver.uri).attempts) == 2)
        driver.wait_for_step(driver.step() + 10)
        lost = new if new.pids(WORKER) else cluster.nodes[1]
        lost.lose()
        assert_undisturbed(driver, recomputed_digests(shards, STEPS))
        first, second, third, *_ = ledger.read_account(driver.uri).attempts
    assert [first.workers, second.workers, third.workers] == [1, 2, 1]
    assert second.restored >= first.last - 10, "steps behind a checkpoint were thrown away to grow"


def _with(model):
    return {"num_attention_heads": 2, "max_position_embeddings": SEQ_LEN, **model}


def test_a_preempted_node_is_left_with_everything_saved(shards, tmp_path):
    """SIGTERM to a node that `raybert.node` runs: the run saves, starts again elsewhere and repeats no step."""
    with ray_nodes(1, 1) as cluster:
        extra = cluster.add(1, command=[sys.executable, "-m", "raybert.node"])
        driver = Driver.of(cluster, tmp_path, shards, "run", train={"steps": 240}, every={"checkpoint": 1000})
        driver.wait_for_step(30)
        victim = extra if extra.pids(WORKER) else None
        if victim is None:
            pytest.skip("no worker was placed on the node that is to be preempted")
        victim.process.send_signal(signal.SIGTERM)
        driver.wait_for("the group's end", lambda: any("about to go" in f["text"] for f in driver.faults("error")))
        victim.process.wait(60)
        victim.gone = True
        cluster.add(1)
        assert_undisturbed(driver, recomputed_digests(shards, 240))
        first, second = ledger.read_account(driver.uri).attempts
    assert second.restored == first.last, "steps were lost"
