"""Sweeps that are killed, interrupted, or have a trial that fails: nothing stays behind, and --resume does the rest."""

import json
import os
import signal
import subprocess
import sys

import pytest
import ray
import yaml

from raybert import config, storage
from raybert.errors import InputError
from raybert.records import read_metrics
from raybert.sweep import space
from raybert.sweep.page import write_summary
from raybert.sweep.run import run_sweep
from raybert.sweep.summary import read_sweep
from tests.clusters import cluster
from tests.data import make_shards
from tests.tasks import make_task
from tests.waiting import wait_for, wait_for_end

COMMAND = [sys.executable, "-m", "raybert.cli", "sweep"]


def write_sweep(folder, *, steps, varied, base=None, asha=False):
    model = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    tree = {
        "name": "s",
        "storage": str(folder),
        "base": {
            "data": {"shards": "shards"},
            "model": model,
            "train": {"steps": steps, "global_batch": 12, "micro_batch": 12},
            "schedule": {"warmup_steps": 2},
            "every": {"log": 5, "validation": steps // 3, "checkpoint": steps // 3, "probe": 0},
            "checkpoint": {"keep_last": 1},
            "validation": {"samples": 20},
            **(base or {}),
        },
        "space": {key: {"grid": values} for key, values in varied.items()},
        "asha": {"enabled": asha},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def free():
    return ray.available_resources().get("CPU", 0.0)


def wait_until_free(cpus):
    wait_for(f"{cpus} free CPUs", lambda: free() >= cpus, signs=[free], told=lambda: f"{free()} are free")


def wait_until_step(driver, log, run, step):
    def there():
        assert driver.poll() is None, log.read_text()[-3000:]
        return any(record["step"] >= step for record in read_metrics(run))

    wait_for(f"step {step}", there, signs=[log.parent], told=lambda: log.read_text()[-3000:])


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_that_is_killed_and_then_interrupted_leaves_nothing_and_comes_to_its_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # trials run elsewhere, and must find what was named from here
    make_shards("shards")
    path = write_sweep(tmp_path, steps=600, varied={"optimizer.lr": [1.0e6, 0.01]})
    sweep = space.load(path)
    second = space.trials(sweep)[1].config.run_uri
    before = free()
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    log = tmp_path / "driver.log"

    def start(*options):
        with open(log, "w") as file:
            return subprocess.Popen([*COMMAND, path, *options], env=environment, stdout=file, stderr=subprocess.STDOUT)

    def ended(driver):
        return wait_for_end(driver, "the sweep", signs=[tmp_path], told=lambda: log.read_text()[-3000:])

    def refused(sentence, *changes, resume):
        with pytest.raises(InputError, match=sentence):
            run_sweep(space.load(path, changes), resume=resume)

    driver = start()
    wait_until_step(driver, log, second, 205)  # step 200 is saved
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_until_free(before)
    first = storage.read_bytes(f"{sweep.uri}/trials/trial-0000/metrics.jsonl")
    assert read_sweep(sweep)[1].status == "interrupted"

    refused("resume it with --resume", resume=False)
    refused("base.optimizer.weight_decay=0.01", "base.optimizer.weight_decay=0.1", resume=True)
    driver = start("--resume")
    wait_until_step(driver, log, second, read_sweep(sweep)[1].steps + 20)
    refused(rf"Another driver \(process {driver.pid} ", resume=True)
    driver.send_signal(signal.SIGINT)
    assert ended(driver) == 130, log.read_text()[-3000:]
    assert "--resume to resume" in log.read_text()
    wait_until_free(before)
    stopped = read_sweep(sweep)[1]
    assert stopped.status == "interrupted"
    assert storage.exists(f"{second}/checkpoints/step-{stopped.steps:08d}"), (
        "the trial under way has not saved its last step"
    )

    driver = start("--resume")
    assert ended(driver) == 0, log.read_text()[-3000:]
    assert storage.read_bytes(f"{sweep.uri}/trials/trial-0000/metrics.jsonl") == first, (
        "a trial that had ended ran again"
    )
    outcomes = read_sweep(sweep)
    assert [outcome.status for outcome in outcomes] == ["diverged", "finished"]
    assert log.read_text().strip().splitlines()[-1] == f"{sweep.uri}/sweep.html"
    assert write_summary(sweep, outcomes) == f"{sweep.uri}/sweep.html"
    winner = config.load(f"{sweep.uri}/winner.yaml")
    assert winner.optimizer.lr == 0.01
    for name in ("heatmap", "loss_tokens", "loss_flops", "best_lr"):
        assert storage.read_bytes(f"{sweep.uri}/{name}.png").startswith(b"\x89PNG")
    wait_until_free(before)


def test_a_sweep_on_one_core_waits_for_its_probes_and_tells_of_trials_that_were_pruned_or_failed(tmp_path, monkeypatch):
    """The pruned trial is the last one: the probes have a core only if its worker's is given back."""
    monkeypatch.chdir(tmp_path)
    make_shards("shards", vocabulary=20)
    make_shards("noise")  # of 50,257 tokens, drawn at random: there is nothing to learn
    damaged = make_shards("damaged")
    shard = tmp_path / "damaged" / damaged.shards()[0].name
    content = bytearray(shard.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    shard.write_bytes(content)
    path = write_sweep(
        tmp_path,
        steps=240,
        varied={"data.shards": ["damaged", "shards", "noise"]},
        base={
            "data": {"verify": "sizes"},
            "optimizer": {"lr": 0.01},
            "probe": {"tasks": [make_task(tmp_path)]},
            "every": {"log": 5, "validation": 80, "checkpoint": 80, "probe": 240},
        },
        asha=True,
    )
    with cluster(1) as small:
        done = small.run(*COMMAND, path, signs=[tmp_path])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 3 trials failed: trial-0000: The data cannot be read" in done.stderr
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert [trial["status"] for trial in summary] == ["failed", "finished", "pruned"]
    probe = summary[1]["probes"]["mine"]
    assert probe["step"] == 240, "the summary was written before the last probe was there"
    assert probe["untrained"]["mean"]["interval"]
    assert probe["tfidf"]["test_accuracy"] > probe["majority"]["test_accuracy"]
    for told in ("untrained", "TF-IDF", "majority"):
        assert told in done.stdout
