"""The node of the probe service is switched off: the service starts again on another one, and loses nothing."""

import subprocess
import sys

import torch

from raybert import storage
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.probe.service import queue
from raybert.probe.tasks import load_task
from tests.clusters import cluster as ray_nodes
from tests.tasks import make_task, queue_checkpoint
from tests.waiting import end_process, wait_for, wait_for_end

SERVICE = "ProbeService"
# Has the run served once, and waits until nothing is queued; what happens in between is the service's own affair.
SERVE = """
import sys, time, ray
from raybert.probe.service import client, queue
ray.init(log_to_driver=False)
client.serve(*sys.argv[1:])
while queue.waiting_steps(sys.argv[1]):
    time.sleep(0.2)
"""


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
        environment = cluster.environment
        log = tmp_path / "log"
        with open(log, "wb") as file:
            waiting = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

        def probed():
            assert waiting.poll() is None, log.read_text()
            return queue.records(run)

        try:
            signs, told = [log, run], log.read_text
            wait_for("the first probe", probed, signs=signs, told=told, pause=0.05)
            (first,) = [node for node in nodes if node.pids(SERVICE)]
            assert len(queue.records(run)) < len(steps), "the probes were done before the node could be lost"
            first.lose()
            assert wait_for_end(waiting, "the probes", signs=signs, told=told) == 0, log.read_text()
        finally:
            end_process(waiting)
        (second,) = [node for node in nodes if not node.gone]
        assert second.pids(SERVICE)
    records = queue.records(run).values()
    assert [record["step"] for record in records] == steps
    assert {record["status"] for record in records} == {"done"}
    assert len({record["pooler"]["test_accuracy"] for record in records}) == 1, "the same weights, other results"
