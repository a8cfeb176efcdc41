"""Ray's own autoscaler over nodes that are processes: a run asks for workers, nodes come, one is lost, all go."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from raybert.records import read_metrics
from raybert.train.recovery.committed import last_step
from tests import clusters
from tests.data import make_shards
from tests.waiting import end_process, wait_for, wait_for_end

HEAD = "f" * 51 + "00000"  # the name that Ray's fake provider expects
STEPS = 400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[clusters.Cluster]:
    (port,) = clusters.free_ports(1)
    groups = yaml.safe_load((Path(__file__).parents[2] / "cluster" / "gcp.yaml").read_text())["available_node_types"]
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config = {
        "cluster_name": "fake",
        "max_workers": 4,
        "upscaling_speed": 10,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{clusters.LOOPBACK}:{port}",
            "launch_multiple": True,
            "head_node_id": HEAD,
        },
        "head_node_type": "ray.head.default",
        # The groups of the GCP file with fewer CPUs, and none of its GPUs.
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "ingest": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
            "spot": {
                "resources": {"CPU": 2},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
                "labels": groups["gpu-spot"]["labels"],
            },
        },
        **{f"{name}_commands": [] for name in commands},
        **{"file_mounts": {}, "cluster_synced_files": [], "auth": {}, "docker": {}},
    }
    path = tmp_path_factory.mktemp("autoscaler") / "cluster.yaml"
    path.write_text(json.dumps(config))
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        # A node whose processes have all ended is known to be lost in seconds, not in a quarter of a minute.
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    options = [f"--autoscaling-config={path}"]
    with clusters.cluster(0, port=port, options=options, environment=environment) as started:
        yield started


def processes(cluster: clusters.Cluster) -> Iterator[tuple[psutil.Process, str]]:
    """Those of the cluster, each with the end of its node's name."""
    for process in cluster.processes():
        try:
            yield process, process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING", HEAD)[-5:]
        except psutil.Error:
            continue


def nodes(cluster: clusters.Cluster) -> set[str]:
    """The nodes beside the head that are up."""
    return {node for process, node in processes(cluster) if process.name() == "raylet"} - {HEAD[-5:]}


def test_nodes_come_for_a_run_one_is_lost_and_they_go_again(cluster, tmp_path):
    shards = make_shards(str(tmp_path / "shards"))
    tree = {
        "run": {"name": "grown", "storage": str(tmp_path)},
        "data": {"shards": shards.uri},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32},
        "train": {"steps": STEPS, "global_batch": 12, "micro_batch": 3, "workers": 2, "dtype": "float32"},
        "schedule": {"warmup_steps": 5},
        "every": {"log": 10, "validation": 0, "probe": 0, "checkpoint": 50},
        "checkpoint": {"keep_last": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    run = str(tmp_path / "grown")
    assert nodes(cluster) == set()
    command = [sys.executable, "-m", "raybert.cli", "pretrain", str(tmp_path / "config.yaml")]
    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=subprocess.STDOUT)

    def told() -> str:
        return f"{nodes(cluster)} are up\n" + (tmp_path / "log").read_text()[-3000:]

    def under_way() -> bool:
        assert driver.poll() is None, told()
        return 0 < last_step(run) < max((record["step"] for record in read_metrics(run)), default=0)

    try:
        wait_for("a step behind a checkpoint", under_way, signs=[tmp_path, lambda: nodes(cluster)], told=told)
        came = nodes(cluster)
        assert len(came) >= 2
        # The loss of a spot node with a worker on it: all its processes end at once.
        victim = next(node for process, node in processes(cluster) if "RayTrainWorker" in " ".join(process.cmdline()))
        assert victim in came
        for process, node in list(processes(cluster)):
            if node == victim:
                process.kill()
        at = last_step(run)
        wait_for_end(driver, "the run", signs=[tmp_path], told=told)
    finally:
        end_process(driver)
    assert driver.returncode == 0, told()
    assert last_step(run) == STEPS > at
    logged = [record["step"] for record in read_metrics(run) if "loss" in record]
    assert logged == list(range(10, STEPS + 1, 10))
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    assert len(lines) > len(logged), "no step was done again, so nothing was lost"
    left = [lambda: nodes(cluster)]
    wait_for(
        "the nodes to go", lambda: not nodes(cluster), signs=left, told=lambda: f"{nodes(cluster)} are up", pause=0.3
    )


def test_a_run_that_the_cluster_can_never_hold_is_refused(cluster, tmp_path):
    shards = make_shards(str(tmp_path / "shards"))
    settings = [f"data.shards={shards.uri}", f"run.storage={tmp_path}", "model.size=tiny", "train.workers=32"]
    settings += ["train.global_batch=32", "train.micro_batch=1"]
    (tmp_path / "c.yaml").write_text("")
    command = [sys.executable, "-m", "raybert.cli", "pretrain", str(tmp_path / "c.yaml"), *settings]
    refused = cluster.run(*command)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "at most 6 CPUs" in refused.stderr
    assert not (tmp_path / "bert").exists()
