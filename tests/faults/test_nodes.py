"""Nodes that come and go: a run follows them, one that is told of its end is left in good order, one may start late."""

import contextlib
import os
import signal
import subprocess
import sys
from itertools import pairwise

import pytest

from raybert.train import ledger
from tests.clusters import LEAVING
from tests.clusters import cluster as ray_nodes
from tests.data import make_shards
from tests.faults.driver import (
    SEQ_LEN,
    Driver,
    assert_same_losses,
    assert_undisturbed,
    plain_losses,
    recomputed_digests,
)
from tests.faults.scenarios import WORKER
from tests.processes import descendants
from tests.waiting import end_process, wait_for, wait_for_end

pytestmark = pytest.mark.skipif("RAYBERT_SLOW" not in os.environ, reason="`make test-faults` does this")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")), seq_len=SEQ_LEN, rows=700).uri


def test_an_elastic_run_shrinks_and_grows(shards, tmp_path):
    """2 workers, 1 when a node is lost, 3 when two come: the same samples and losses; growing throws no step away."""
    train = {"steps": 100_000, "workers": [1, 3], "resize_seconds": 3}
    with ray_nodes(1, 1, 1) as cluster:  # a CPU more than workers, for the stream
        driver = Driver.of(cluster, tmp_path, shards, "run", train=train, every={"log": 1, "checkpoint": 20})

        def attempts():
            return ledger.read_account(driver.uri).attempts

        driver.wait_for_step(10)
        driver.wait_for("two workers", lambda: attempts()[-1].workers == 2)
        driver.wait_for_step(driver.step() + 10)
        next(node for node in cluster.nodes[1:] if node.pids(WORKER)).lose()
        driver.wait_for("one worker", lambda: attempts()[-1].workers == 1)
        driver.wait_for_step(driver.step() + 10)
        for _ in range(2):
            cluster.add(1)
        driver.wait_for("three workers", lambda: attempts()[-1].workers == 3)
        driver.wait_for_step(driver.step() + 20)
        assert driver.process is not None
        driver.process.send_signal(signal.SIGINT)
        assert driver.wait() == 130, driver.said[-3000:]
        digests = ledger.read_account(driver.uri).digests.tolist()
    (*_, last), grown = attempts(), driver.faults("resize")
    for before, after in pairwise(attempts()):
        if after.workers > before.workers:
            assert before.last - after.restored < 20, "steps behind a checkpoint were thrown away to grow"
    assert last.workers == 3
    assert grown[-1]["workers"] == 3
    assert digests == recomputed_digests(shards, len(digests))
    assert_same_losses(driver.uri, plain_losses(shards, len(digests), train["steps"]))


def test_a_preempted_node_is_left_with_everything_saved(shards, tmp_path):
    """SIGTERM to a node that `raybert.node` runs: the run saves, starts again elsewhere and repeats no step."""
    with ray_nodes(1) as cluster:
        told = [cluster.add(1, command=LEAVING) for _ in range(2)]
        driver = Driver.of(cluster, tmp_path, shards, "run", train={"steps": 240}, every={"checkpoint": 1000})
        driver.wait_for_step(30)
        victim = next(node for node in told if node.pids(WORKER))
        victim.process.send_signal(signal.SIGTERM)
        driver.wait_for("the group's end", lambda: driver.faults("preempted"))
        wait_for_end(victim.process, "the node", signs=[victim.log])
        victim.gone = True
        cluster.add(1)
        assert_undisturbed(driver, recomputed_digests(shards, 240))
        first, second = ledger.read_account(driver.uri).attempts
    assert second.restored == first.last, "steps were lost"


ALONE = """
import ray
from raybert import cluster
cluster.connection.STARTS = 6
cluster.connect()
print("sum", ray.get(ray.remote(lambda: 1 + 1).remote()), flush=True)
input()
"""


def test_a_local_ray_that_is_not_up_in_time_is_started_again(tmp_path):
    """A raylet whose agents are not up after 15 seconds ends, and Ray gives up."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_raylet_start_wait_time_s"] = "30"  # Ray's own; tests have more
    said = tmp_path / "said"
    with open(said, "wb") as file:
        command = [sys.executable, "-c", ALONE]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment)

    def below(name: str) -> list[int]:
        # Interpreter, option, script: further on, the raylet's command line names its agents.
        titles = {pid: title.split() for pid, title in descendants(process.pid).items()}
        return [pid for pid, parts in titles.items() if any(part.endswith(name) for part in parts[:3])]

    def has_ended() -> bool:
        return process.poll() is not None

    agents: list[int] = []
    try:
        agents += wait_for("the first agent", lambda: has_ended() or below("dashboard/agent.py"), pause=0.01)
        os.kill(agents[0], signal.SIGSTOP)
        wait_for("an answer", lambda: has_ended() or "sum 2\n" in said.read_text(), signs=[said])
        assert "starting it again" in said.read_text()
        assert "sum 2\n" in said.read_text()
        for server in ("gcs_server", "dashboard/dashboard.py", "log_monitor.py"):
            assert len(below(server)) == 1, f"{server} of the first start is left"
    finally:
        end_process(process)
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent, signal.SIGKILL)
