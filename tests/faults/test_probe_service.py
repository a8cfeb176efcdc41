"""The probe service is killed again and again while checkpoints arrive: each gets one record."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import ray
import torch

from raybert import storage
from raybert.errors import RunFailed
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.probe.service import client, owner, queue
from raybert.probe.service.owner import Owner
from raybert.probe.tasks import load_task, parse_task
from tests import waiting
from tests.processes import titled
from tests.tasks import make_task, queue_checkpoint
from tests.waiting import LONGEST, wait_for

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
        os.kill(titled(os.getpid(), "ProbeService")[0], signal.SIGKILL)
    except (IndexError, ProcessLookupError):
        return False  # it is just starting again
    return True


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
        client.wait(run, str(tmp_path), timeout=LONGEST)
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
    client.wait(run, str(tmp_path), timeout=LONGEST)
    status = {record["step"]: record["status"] for record in queue.records(run).values()}
    assert status == dict.fromkeys(range(1, 6), "skipped") | dict.fromkeys(range(6, 9), "done")


def test_what_cannot_be_probed_is_recorded_with_its_reason(task, model, tmp_path):
    run = make_run(tmp_path, "broken")
    request = queue.Request(run, 1, (task,), positions=32, cpus=0.5, max_waiting=3)
    storage.write_bytes(f"{request.weights}/model.safetensors", b"cos\nsystem\n")
    assert queue.add(request)
    client.serve(run, str(tmp_path))
    client.wait(run, str(tmp_path), timeout=LONGEST)
    (record,) = queue.records(run).values()
    assert record["status"] == "failed"
    assert "config.json" in record["reason"]


def test_a_probe_whose_process_or_service_is_killed_is_done_again(model, tmp_path):
    # As many texts as keep it busy for longer than finding its process takes.
    task = load_task(make_task(tmp_path, n_train=20_000))
    run = make_run(tmp_path, "killed")
    submit(run, tmp_path, 1, task, model)

    def under_way(title):
        assert not queue.records(run)
        return titled(os.getpid(), title)

    first = wait_for("the process of a probe", lambda: under_way("::_probe"), pause=0.02)[-1]
    os.kill(first, signal.SIGKILL)
    # The second attempt ends with its service.
    wait_for("another process", lambda: set(under_way("::_probe")) - {first}, pause=0.02)
    assert kill_service()
    client.wait(run, str(tmp_path), timeout=LONGEST)
    (record,) = queue.records(run).values()
    assert record["status"] == "done"
    assert record["seconds_waited"] > 0

    # Of a fine-tuning only the seed whose process is killed is trained again.
    tree = task.model_dump(exclude={"kind"}) | {"kind": "finetune", "name": "tuned", "n_train": 1600, "epochs": 1}
    run = make_run(tmp_path, "tuned")
    queue_checkpoint(run, 1, parse_task(tree, "here"), model, workers=2, max_waiting=3)
    client.announce(run, str(tmp_path))
    seeds = Path(queue.weights_uri(run, 1), "trained")
    wait_for("a seed that is trained", lambda: under_way("") and seeds.is_dir() and list(seeds.iterdir()), pause=0.02)
    trained = {seed: seed.stat().st_mtime_ns for seed in seeds.iterdir()}
    os.kill(wait_for("the process of a seed", lambda: under_way("::_train"), pause=0.02)[-1], signal.SIGKILL)
    wait_for("another one", lambda: set(seeds.iterdir()) > trained.keys() or queue.records(run), pause=0.02)
    assert all(not seed.exists() or seed.stat().st_mtime_ns == when for seed, when in trained.items())
    client.wait(run, str(tmp_path), timeout=LONGEST)
    (record,) = queue.records(run).values()
    assert record["status"] == "done"
    assert len(record["pooler"]["seeds"]) == 3
    assert set(record["baselines"]) == {"majority", "untrained"}
    assert storage.list_dir(f"{run}/probes/weights") == []

    # What a seed's own code says is the record's reason.
    tree |= {"name": "short", "max_seconds": 1e-6}
    queue_checkpoint(run, 2, parse_task(tree, "here"), model, max_waiting=3)
    client.announce(run, str(tmp_path))
    client.wait(run, str(tmp_path), timeout=LONGEST)
    short = queue.records(run)["short-00000002.json"]
    assert short["status"] == "failed"
    assert short["reason"].startswith(
        "RunFailed: The time limit max_seconds=1e-06 was reached after 0 of the 100 steps"
    )


def test_a_service_without_cpus_says_so_and_the_next_wait_starts_one_that_was_stopped(task, model, tmp_path):
    run = make_run(tmp_path, "stopped")
    queue_checkpoint(run, 1, task, model, cpus=64, max_waiting=3)
    client.serve(run, str(tmp_path))
    running = wait_for(
        "a probe that waits",
        lambda: [r for status in client.statuses() for one in status["runs"] for r in one["running"]],
    )
    assert running[0]["seconds"] is None
    assert running[0]["waits_for"].startswith("64 CPUs (the cluster has")
    # From another process: the Ray that runs is found by its address.
    command = [sys.executable, "-m", "raybert.cli", "probe", "status", "--json"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    seen = waiting.run(command, env=environment)
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
    client.wait(run, str(tmp_path), timeout=LONGEST, take_over=False)
    assert queue.records(run)["mine-00000001.json"]["status"] == "done"
    assert ray.is_initialized()
