"""A sweep whose driver is killed: nothing stays behind, and --resume does what was left."""

import os
import signal
import subprocess
import sys
import time

import pytest
import ray
import yaml

from raybert import config, storage
from raybert.sweep import space
from raybert.sweep.page import write_summary
from raybert.sweep.summary import read_sweep
from raybert.telemetry import read_metrics
from tests.data import make_shards

pytestmark = pytest.mark.usefixtures("ray_cluster")


def free():
    return ray.available_resources().get("CPU", 0.0)


def wait_until_free(cpus):
    end = time.monotonic() + 90
    while free() < cpus:
        assert time.monotonic() < end, f"{free()} CPUs are free, and {cpus} were before"
        time.sleep(0.5)


@pytest.mark.timeout(290)
def test_a_killed_driver_leaves_nothing_and_resume_finishes_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # trials run elsewhere, and must find what was named from here
    make_shards("shards")
    tree = {
        "name": "s",
        "storage": str(tmp_path),
        "base": {
            "data": {"shards": "shards"},
            "model": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 32,
            },
            "train": {"steps": 60, "global_batch": 12, "micro_batch": 12},
            "schedule": {"warmup_steps": 2},
            "every": {"log": 5, "validation": 20, "checkpoint": 20, "probe": 0},
            "checkpoint": {"keep_last": 1},
            "validation": {"samples": 20},
        },
        "space": {"optimizer.lr": {"grid": [0.003, 1.0e6, 0.01]}},
        "asha": {"enabled": False},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    sweep = space.load(str(path))
    third = space.trials(sweep)[2].config.run_uri
    before = free()
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "raybert.cli", "sweep", str(path)]

    with open(tmp_path / "first.log", "w") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while not any(record["step"] >= 25 for record in read_metrics(third)):
            assert driver.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(0.1)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    wait_until_free(before)
    first = storage.read_bytes(f"{sweep.uri}/trials/trial-0000/metrics.jsonl")
    assert read_sweep(sweep)[2].status == "stopped early"

    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert storage.read_bytes(f"{sweep.uri}/trials/trial-0000/metrics.jsonl") == first, "a finished trial ran again"
    outcomes = read_sweep(sweep)
    assert [outcome.status for outcome in outcomes] == ["finished", "diverged", "finished"]
    assert done.stdout.strip().splitlines()[-1] == f"{sweep.uri}/sweep.html"
    assert write_summary(sweep) == f"{sweep.uri}/sweep.html"
    winner = config.load(f"{sweep.uri}/winner.yaml")
    assert winner.optimizer.lr in (0.003, 0.01)
    for name in ("heatmap", "loss_tokens", "loss_flops", "best_lr"):
        assert storage.read_bytes(f"{sweep.uri}/{name}.png").startswith(b"\x89PNG")
    wait_until_free(before)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "--resume" in again.stderr
