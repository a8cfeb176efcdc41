"""The node of the probe service is switched off: the service starts again on another one, and loses nothing."""

import subprocess
import sys
import time

import pytest
import torch

from raybert import storage
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.probe.service import queue
from raybert.probe.tasks import load_task
from tests.faults.cluster import ray_nodes
from tests.tasks import make_task, queue_checkpoint

SERVICE = "ProbeService"
# Has the run served once, and waits until nothing is queued; what happens in between is the service's own affair.
SERVE = """
import sys, time, ray
from raybert.probe import client, queue
ray.init(log_to_driver=False)
client.serve(*sys.argv[1:])
while queue.waiting_steps(sys.argv[1]):
    time.sleep(0.2)
"""


@pytest.mark.timeout(280)
def test_the_service_outlives_its_node(tmp_path):
    task = load_task(make_task(tmp_path, n_train=2_000))
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    model, run = Bert(config), f"{tmp_path}/run"
    storage.write_bytes(f"{run}/config.yaml", b"{}")
    steps = [100 * (i + 1) for i in range(6)]
    for step in steps:
        queue_checkpoint(run, step, task, model, max_waiting=len(steps))
    with ray_nodes() as cluster:
        cluster.add(0, labels="ray.io/market-type=spot")  # the head is no place for the service here
        nodes = [cluster.add(1) for _ in range(2)]
        command = [sys.executable, "-c", SERVE, run, str(tmp_path)]
        environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as waiting:
            try:
                while not queue.records(run):
                    assert waiting.poll() is None, waiting.communicate()[0].decode()
                    time.sleep(0.1)
                (first,) = [node for node in nodes if node.pids(SERVICE)]
                assert len(queue.records(run)) < len(steps), "the probes were done before the node could be lost"
                first.lose()
                said = waiting.communicate(timeout=200)[0].decode()
            finally:
                waiting.kill()
        assert waiting.returncode == 0, said
        (second,) = [node for node in nodes if not node.gone]
        assert second.pids(SERVICE)
    records = queue.records(run).values()
    assert [record["step"] for record in records] == steps
    assert {record["status"] for record in records} == {"done"}
    assert len({record["pooler"]["test_accuracy"] for record in records}) == 1, "the same weights, other results"
