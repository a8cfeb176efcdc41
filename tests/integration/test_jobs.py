"""Commands as jobs of a cluster with a token, a head and a spot node, sent from a copy of the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest
import yaml

import raybert
from raybert.probe import kinds
from raybert.records import read_metrics
from raybert.train.recovery.committed import last_step
from tests import clusters
from tests.tasks import make_task
from tests.waiting import LONGEST, end_process, wait_for, wait_for_end

ROOT = Path(raybert.__file__).parents[1]
KEPT = {"JobSupervisor", "TrainController", "ProbeService"}
LEFT_OUT = (".venv", ".git", "runs", "build", "*cache*", "*.egg-info", ".hypothesis")
FOLLOW = """
import sys
from raybert.cluster.jobs import Job, follow
sys.exit(follow(Job(*sys.argv[1:]), lambda text: print(text, end="", flush=True)))
"""
WHERE = """
import json, ray
from ray.util.state import list_actors
ray.init(log_to_driver=False)
labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
print(json.dumps([[actor.class_name, labels[actor.node_id].get("ray.io/market-type", "")] for actor in actors]))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout") / "raybert"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


@pytest.fixture(scope="module")
def cluster() -> Iterator[clusters.Cluster]:
    # Metrics leave the nodes every 10 seconds otherwise. A stopped job is not killed before it has saved.
    environment = {"RAY_metrics_report_interval_ms": "1000", "RAY_JOB_STOP_WAIT_TIME_S": f"{LONGEST:.0f}"}
    with clusters.cluster(1, environment=environment) as started:
        started.wait_for_jobs_api()
        started.add(3, command=clusters.LEAVING, labels="ray.io/market-type=spot")
        yield started


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bucket")


Done = subprocess.CompletedProcess[str]


def job(cluster: clusters.Cluster, checkout: Path, *arguments: str, wait: bool = True) -> Done:
    """`ray job submit`, as README has it."""
    options = ["--address", cluster.dashboard, "--working-dir", "."] + ([] if wait else ["--no-wait"])
    return cluster.run(clusters.RAY, "job", "submit", *options, "--", "python", *arguments, cwd=checkout)


def submit(cluster: clusters.Cluster, checkout: Path, *arguments: str) -> Done:
    """`raybert submit`, followed to the job's end, from a machine that is not of the cluster."""
    command = [sys.executable, "-m", "raybert.cli", "submit", "--follow", "--address", cluster.dashboard, *arguments]
    return cluster.run(*command, cwd=checkout, env={"RAY_ADDRESS": ""})


def api(cluster: clusters.Cluster, path: str) -> Any:
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(cluster.dashboard + path, headers=headers)
    with urllib.request.urlopen(request, timeout=LONGEST) as found:
        return json.load(found)


@pytest.fixture(scope="module")
def shards(cluster: clusters.Cluster, checkout: Path, place: Path) -> str:
    """Prepared by a job."""
    sentence = "The quick brown fox jumps over the lazy dog number {}. It was seen by {} people near the river bank."
    documents = [" ".join(sentence.format(i + j, i * j) for j in range(20)) for i in range(60)]
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    output = str(place / "shards")
    arguments = ["--input", str(place / "text.jsonl"), "--output", output, "--seq-len", "32"]
    done = job(cluster, checkout, "jobs/prepare.py", *arguments, "--validation-fraction", "0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def settings(checkout: Path, place: Path, shards: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    tree = {
        "run": {"name": "job", "storage": str(place)},
        "data": {"shards": shards},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32},
        "train": {"steps": 1_000_000, "global_batch": 12, "micro_batch": 3, "workers": 2, "dtype": "float32"},
        "schedule": {"warmup_steps": 5},
        "every": {"log": 10, "validation": 100, "probe": 100, "checkpoint": 100},
        "checkpoint": {"keep_last": 1},
        "validation": {"samples": 12},
        "probe": {"tasks": [make_task(tmp_path_factory.mktemp("task"))]},
    }
    (checkout / "jobs" / "job.yaml").write_text(yaml.safe_dump(tree))
    return ["jobs/job.yaml"]


@pytest.fixture(scope="module")
def training(cluster: clusters.Cluster, checkout: Path, place: Path, settings: list[str]) -> str:
    """The id of a job that trains, and has a checkpoint and a probe behind it."""
    sent = job(cluster, checkout, "jobs/pretrain.py", *settings, wait=False)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    found = re.search(r"raysubmit_\w+", sent.stdout)
    assert found

    run = place / "job"

    def behind() -> bool:
        running = api(cluster, f"/api/jobs/{found[0]}")["status"] in ("PENDING", "RUNNING")
        assert running, logs(cluster, found[0])
        return last_step(str(run)) > 0 and any((run / "probes").glob("mine-*.json"))

    told = lambda: logs(cluster, found[0])  # noqa: E731
    wait_for("a checkpoint and a probe", behind, signs=[run, told], told=told, pause=0.3)
    return found[0]


def logs(cluster: clusters.Cluster, job_id: str) -> str:
    return str(api(cluster, f"/api/jobs/{job_id}/logs")["logs"])


def test_a_wrong_setting_is_a_sentence_in_the_log_and_exit_code_2(cluster, checkout, settings):
    done = job(cluster, checkout, "jobs/pretrain.py", *settings, "train.step=3")
    assert done.returncode == 1  # what the CLI says of any job that failed
    assert "Did you mean train.steps?" in done.stdout
    assert "Traceback" not in done.stdout.partition("Job 'raysubmit")[0]
    sent = [job for job in api(cluster, "/api/jobs/") if "train.step=3" in job["entrypoint"]]
    assert [job["driver_exit_code"] for job in sent] == [2]
    refused = submit(cluster, checkout, "pretrain", *settings, "run.storage=runs")
    assert refused.returncode == 2
    assert "all nodes share" in refused.stderr


def test_the_doctor_looks_at_every_node_as_a_job(cluster, checkout, settings):
    done = submit(cluster, checkout, "doctor", *settings)
    said = dict(line.strip().split("  ", 1) for line in done.stdout.splitlines() if "  ok: " in line)
    assert said["nodes"] == "ok: 2 of 2 ran a task", done.stdout + done.stderr
    assert said["dashboard"] == f"ok: {cluster.dashboard} requires a token"
    assert said["raybert"].endswith("on every node")
    assert said["run.storage"].startswith("ok: every node can use ")


def test_only_workers_are_on_the_spot_node(cluster, training):
    found = cluster.run(sys.executable, "-c", WHERE)
    assert found.returncode == 0, found.stderr
    placed = json.loads(found.stdout.strip().splitlines()[-1])
    spot = {name for name, market in placed if market == "spot"}
    kept = {name for name, market in placed if market != "spot"}
    assert kept >= KEPT
    assert not spot & KEPT
    assert "RayTrainWorker" in spot


def test_the_dashboard_lists_the_run(cluster, training):
    (found,) = [run for run in api(cluster, "/api/train/v2/runs/v1")["train_runs"] if run["name"] == "job"]
    assert found["status"] == "RUNNING"
    (attempt,) = found["attempts"]
    assert [worker["world_rank"] for worker in attempt["workers"]] == [0, 1]


def test_every_panel_of_the_dashboard_shows_the_run(cluster, training, tmp_path):
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("there is no prometheus here: apt-get install prometheus")
    config = yaml.safe_load((ROOT / "cluster" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s"}
    config["scrape_configs"][0]["file_sd_configs"][0] = {
        "files": [f"{cluster.folder}/ray/prom_metrics_service_discovery.json"],
        "refresh_interval": "1s",
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = clusters.free_ports(1)
    address = f"{clusters.LOOPBACK}:{port}"
    flags = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen([prometheus, *flags, f"--web.listen-address={address}"], stderr=log, stdout=log)
    try:
        missing = panel_queries()

        def all_found() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            for title, query in list(missing.items()):
                if _query(address, query):
                    del missing[title]
            return not missing

        told = lambda: f"no data for {missing}; there are {_names(address)}"  # noqa: E731
        wait_for("the panels' data", all_found, signs=[lambda: len(missing)], told=told, pause=1)
    finally:
        end_process(server)


def panel_queries() -> dict[str, str]:
    dashboard = json.loads((ROOT / "cluster" / "grafana" / "raybert.json").read_text())
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == ["train", "ingest", "checkpoint", "probes", *(f"probes: {kind}" for kind in kinds.KINDS)]
    assert {"run", "trial"} <= {variable["name"] for variable in dashboard["templating"]["list"]}
    found = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$run", "job").replace("$trial", ".*")
            query = re.sub(r'kind="\w+"', 'kind=~".+"', query)  # the run's probes are of one kind
            found[f"{panel['title']} {target['refId']}"] = query
    found["C tuned"] = 'ray_raybert_probe_figure{run="job",figure="tuned_accuracy"}'
    assert len(found) > 20
    return found


def _query(address: str, query: str) -> list[Any]:
    url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return list(json.load(answer)["data"]["result"])
    except OSError:
        return []


def _names(address: str) -> list[str]:
    found = _query(address, 'count by (__name__) ({__name__=~"ray_(raybert|data|train).*"})')
    return sorted(each["metric"]["__name__"] for each in found)


def test_a_stopped_job_leaves_a_checkpoint_and_the_same_command_goes_on(cluster, checkout, place, settings, training):
    run = str(place / "job")
    stopped = cluster.run(clusters.RAY, "job", "stop", "--address", cluster.dashboard, training)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert api(cluster, f"/api/jobs/{training}")["status"] == "STOPPED"
    step = last_step(run)
    assert step == read_metrics(run)[-1]["step"], "steps that were logged are not in the checkpoint"
    text = logs(cluster, training)
    assert re.search(r"^step +\d+/1000000 \| loss \d+\.\d+ ", text, re.MULTILINE), text
    assert f"interrupted: {run} is saved at step {step}" in text

    done = submit(cluster, checkout, "pretrain", *settings, f"train.steps={step + 40}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"done: {step + 40} steps" in done.stdout
    logged = [record["step"] for record in read_metrics(run) if "loss" in record]
    assert logged[-1] == step + 40
    job_id = re.search(r"raysubmit_\w+", done.stdout)
    assert job_id
    assert f"{cluster.dashboard}/#/jobs/{job_id[0]}" in done.stdout
    metadata = api(cluster, f"/api/jobs/{job_id[0]}")["metadata"]
    assert metadata["raybert.run"] == run
    assert metadata["raybert.command"].startswith("pretrain jobs/job.yaml")


def test_the_probe_service_outlives_its_jobs_and_the_report_is_a_job(cluster, checkout, place):
    run = str(place / "job")
    waited = submit(cluster, checkout, "probe", "wait", run, "--timeout", str(LONGEST))
    assert waited.returncode == 0, waited.stdout + waited.stderr
    assert os.path.exists(f"{run}/probes/mine-{last_step(run):08d}.json")
    status = submit(cluster, checkout, "probe", "status", "--json")
    (service,) = json.loads(status.stdout.strip().splitlines()[-1])
    assert [each["run"] for each in service["runs"]] == [run]
    reported = submit(cluster, checkout, "report", run)
    assert reported.returncode == 0, reported.stdout + reported.stderr
    assert os.path.exists(f"{run}/report.html")
    texts, vectors = ["--input", str(place / "text.jsonl")], ["--output", str(place / "vectors")]
    embedded = submit(cluster, checkout, "embed", f"{run}/checkpoints/best", *texts, *vectors)
    assert embedded.returncode == 0, embedded.stdout + embedded.stderr
    assert pads.dataset(place / "vectors").count_rows() == 60


def test_a_dropped_connection_does_not_end_the_following(cluster):
    """A forwarded port is cut in the middle and opened again: each line is shown once, the code is the job's."""
    lines = "; ".join(f"echo line {i}; sleep 0.3" for i in range(20))
    options = ["--address", cluster.dashboard, "--no-wait"]
    sent = cluster.run(clusters.RAY, "job", "submit", *options, "--", "sh", "-c", f"{lines}; exit 3")
    (port,) = clusters.free_ports(1)
    dashboard = int(cluster.dashboard.rpartition(":")[2])
    job = [re.search(r"raysubmit_\w+", sent.stdout)[0], f"http://{clusters.LOOPBACK}:{port}"]
    with clusters.forwarded(port, dashboard):
        process = subprocess.Popen(
            [sys.executable, "-c", FOLLOW, *job], env=cluster.environment, stdout=subprocess.PIPE, text=True
        )
        first = [process.stdout.readline() for _ in range(3)]
    time.sleep(1)
    with clusters.forwarded(port, dashboard):
        rest = process.stdout.read()
        wait_for_end(process, "the following")
    said = re.findall(r"^line \d+$", "".join(first) + rest, re.MULTILINE)
    assert said == [f"line {i}" for i in range(20)], "".join(first) + rest
    assert process.returncode == 3


def test_a_sweep_is_a_job(cluster, checkout, place, settings):
    base = yaml.safe_load((checkout / settings[0]).read_text())
    base["train"]["steps"] = 20
    base["train"]["workers"] = 1
    base["every"] = {"log": 5, "validation": 10, "checkpoint": 20, "probe": 0}
    del base["run"]
    tree = {"name": "s", "storage": str(place), "base": base, "space": {"optimizer.lr": {"grid": [0.001]}}}
    (checkout / "jobs" / "s.yaml").write_text(yaml.safe_dump(tree))
    done = submit(cluster, checkout, "sweep", "jobs/s.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.path.exists(place / "s" / "winner.yaml")
