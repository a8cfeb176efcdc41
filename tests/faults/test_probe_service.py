"""The probe service is killed again and again while checkpoints arrive: each gets one record."""

import os
import random
import signal
import time

import pytest
import ray
import torch

from raybert import storage
from raybert.errors import RunFailed
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.files import save
from raybert.probe import client, queue
from raybert.probe.tasks import load_task
from tests.tasks import make_task

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
    client.submit(
        run, str(folder), step, [task], lambda uri: save(model, uri), positions=32, cpus=0.5, max_waiting=max_waiting
    )


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
        queue.add(run, step, [task], lambda uri: save(model, uri), positions=32, cpus=0.5, max_waiting=3)
    client.serve(run, str(tmp_path))
    client.wait(run, str(tmp_path), timeout=120)
    status = {record["step"]: record["status"] for record in queue.records(run).values()}
    assert status == dict.fromkeys(range(1, 6), "skipped") | dict.fromkeys(range(6, 9), "done")


def test_what_cannot_be_probed_is_recorded_with_its_reason(task, model, tmp_path):
    run = make_run(tmp_path, "broken")
    queue.add(
        run,
        1,
        [task],
        lambda uri: storage.write_bytes(f"{uri}/model.safetensors", b"cos\nsystem\n"),
        positions=32,
        cpus=0.5,
        max_waiting=3,
    )
    client.serve(run, str(tmp_path))
    client.wait(run, str(tmp_path), timeout=60)
    (record,) = queue.records(run).values()
    assert record["status"] == "failed"
    assert "config.json" in record["reason"]


def test_a_service_that_was_stopped_starts_again_with_the_next_wait(task, model, tmp_path):
    run = make_run(tmp_path, "stopped")
    assert client.stop()
    queue.add(run, 1, [task], lambda uri: save(model, uri), positions=32, cpus=0.5, max_waiting=3)
    with pytest.raises(RunFailed, match="still wait"):
        client.wait(run, str(tmp_path), timeout=0)
    client.wait(run, str(tmp_path), timeout=60)
    assert queue.records(run)["mine-00000001.json"]["status"] == "done"
    assert ray.is_initialized()
