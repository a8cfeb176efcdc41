"""The probe service is killed again and again while checkpoints arrive: each gets one record."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import ray
import torch

from raybert import storage
from raybert.errors import RunFailed
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.probe.service import client, owner, queue
from raybert.probe.service.owner import Owner
from raybert.probe.tasks import load_task
from tests.processes import titled
from tests.tasks import make_task, queue_checkpoint

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return load_task(make_task(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    return Bert(config)


def make_run(folder, name):
    storage.write_bytes(f"{folder}/{name}/config.yaml", b"{}")
    return f"{folder}/{name}"


def submit(run, folder, step, task, model, max_waiting=20):
    if queue_checkpoint(run, step, task, model, max_waiting=max_waiting):
        client.announce(run, str(folder))


def kill_service():
    try:
        pid = client.statuses(timeout=2)[0]["pid"]
        os.kill(pid, signal.SIGKILL)
    except (KeyError, IndexError, ProcessLookupError):
        return False  # it is just starting again
    return True


@pytest.mark.timeout(280)
def test_each_checkpoint_gets_one_record_whenever_the_service_is_killed(task, model, tmp_path):
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b")]
    for run in runs:
        client.serve(run, str(tmp_path))
    rng, killed = random.Random(7), 0
    for step in range(1, 11):
        for run in runs:
            submit(run, tmp_path, step * 100, task, model)
        time.sleep(rng.uniform(0, 1))
        if step % 3 == 0:
            killed += kill_service()
    assert killed
    for run in runs:
        client.wait(run, str(tmp_path), timeout=200)
        records = queue.records(run)
        assert list(records) == [f"mine-{step * 100:08d}.json" for step in range(1, 11)]
        assert {record["status"] for record in records.values()} == {"done"}
        accuracies = {record["pooler"]["test_accuracy"] for record in records.values()}
        assert len(accuracies) == 1, "the same weights were measured differently"
        assert storage.list_dir(f"{run}/probes/weights") == []
        # What comes by again is known.
        submit(run, tmp_path, 100, task, model)
        assert queue.waiting_steps(run) == []


def test_past_the_limit_the_oldest_are_recorded_as_skipped(task, model, tmp_path):
    run = make_run(tmp_path, "many")
    for step in range(1, 9):
        queue_checkpoint(run, step, task, model, max_waiting=3)
    client.serve(run, str(tmp_path))
    client.wait(run, str(tmp_path), timeout=120)
    status = {record["step"]: record["status"] for record in queue.records(run).values()}
    assert status == dict.fromkeys(range(1, 6), "skipped") | dict.fromkeys(range(6, 9), "done")


def test_what_cannot_be_probed_is_recorded_with_its_reason(task, model, tmp_path):
    run = make_run(tmp_path, "broken")
    request = queue.Request(run, 1, (task,), positions=32, cpus=0.5, max_waiting=3)
    storage.write_bytes(f"{request.weights}/model.safetensors", b"cos\nsystem\n")
    assert queue.add(request)
    client.serve(run, str(tmp_path))
    client.wait(run, str(tmp_path), timeout=60)
    (record,) = queue.records(run).values()
    assert record["status"] == "failed"
    assert "config.json" in record["reason"]


def test_a_probe_whose_process_is_killed_is_done_again(model, tmp_path):
    # As many texts as keep it busy for longer than finding its process takes.
    task = load_task(make_task(tmp_path, n_train=20_000))
    run = make_run(tmp_path, "killed")
    submit(run, tmp_path, 1, task, model)
    end = time.monotonic() + 90
    while not (found := titled(os.getpid(), "::_probe")):
        assert time.monotonic() < end, "no process of a probe was seen"
        assert not queue.records(run)
        time.sleep(0.05)
    os.kill(found[-1], signal.SIGKILL)
    client.wait(run, str(tmp_path), timeout=120)
    (record,) = queue.records(run).values()
    assert record["status"] == "done"
    assert record["seconds_waited"] > 0


def test_a_service_without_cpus_says_so_and_the_next_wait_starts_one_that_was_stopped(task, model, tmp_path):
    run = make_run(tmp_path, "stopped")
    queue_checkpoint(run, 1, task, model, cpus=64, max_waiting=3)
    client.serve(run, str(tmp_path))
    end = time.monotonic() + 60
    while not (running := [r for status in client.statuses() for one in status["runs"] for r in one["running"]]):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert running[0]["seconds"] is None
    assert running[0]["waits_for"].startswith("64 CPUs (the cluster has")
    # From another process: the Ray that runs is found by its address.
    command = [sys.executable, "-m", "raybert.cli", "probe", "status", "--json"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    seen = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)[0]["cluster"] == owner.cluster_id()
    assert client.stop()
    assert not owner.is_served(run)
    storage.remove(queue.queue_uri(run, 1))
    queue_checkpoint(run, 1, task, model, max_waiting=3)
    # Served from elsewhere, it is only looked at.
    owner.claim(run, Owner("probe-service-x", "another cluster"))
    with pytest.raises(RunFailed, match="still wait"):
        client.wait(run, str(tmp_path), timeout=1, take_over=False)
    assert client.services() == []
    owner.release(run, Owner("probe-service-x", "another cluster"))
    client.wait(run, str(tmp_path), timeout=60, take_over=False)
    assert queue.records(run)["mine-00000001.json"]["status"] == "done"
    assert ray.is_initialized()
