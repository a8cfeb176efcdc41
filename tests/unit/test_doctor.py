"""Each judgement of `raybert doctor`: what is in order, what is not, and what to do then."""

from dataclasses import replace

import pytest

from raybert.config import from_mapping
from raybert.doctor import judge
from raybert.doctor.judge import NodeFacts

GIB = float(2**30)
VERSIONS = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0", "raybert": "0.1.0 (1a2b)"}
NODE = NodeFacts("10.0.0.1", VERSIONS, cpus=8, gpus=0, object_store=2 * GIB, shared_memory=int(4 * GIB), threads=1)


def nodes(**second):
    return [NODE, replace(NODE, name="10.0.0.2", **second)]


def subjects(lines):
    return {line.subject: line for line in lines}


def test_equal_nodes_are_in_order():
    both = nodes()
    lines = [*judge.versions(both), judge.clocks(both), judge.shared_memory(both), judge.threads(both, 1.0, 2)]
    lines += [judge.nodes(both, {}), judge.storage("run.storage", "gs://b/runs", both)]
    assert [line.remedy for line in lines] == [""] * len(lines)
    assert subjects(lines)["torch"].detail == "2.13.0 on every node"


@pytest.mark.parametrize("package", VERSIONS)
def test_another_version_on_one_node_is_named(package):
    found = subjects(judge.versions(nodes(versions=VERSIONS | {package: "9.9"})))
    assert [name for name, line in found.items() if line.remedy] == [package]
    assert "9.9 on 10.0.0.2" in found[package].detail
    assert "10.0.0.1" in found[package].detail


def test_a_node_that_runs_nothing_is_named():
    line = judge.nodes([NODE], {"10.0.0.9": "No module named 'raybert'"})
    assert line.detail == "10.0.0.9 ran no task: No module named 'raybert'"
    assert "install raybert" in line.remedy


def test_a_clock_is_wrong_only_beyond_doubt():
    assert not judge.clocks(nodes(skew=-8.0, skew_error=7.0)).remedy, "a slow answer is no wrong clock"
    line = judge.clocks(nodes(skew=-8.0, skew_error=0.01))
    assert "10.0.0.2 is 8.0 s behind" in line.detail
    assert "ahead of" in judge.clocks(nodes(skew=8.0, skew_error=0.01)).detail
    assert "NTP" in line.remedy


def test_shared_memory_must_hold_what_ray_wants():
    line = judge.shared_memory(nodes(shared_memory=64 << 20))
    assert line.detail == "0.1 GiB on 10.0.0.2, but Ray's object store needs 2.0 GiB"
    assert "--shm-size" in line.remedy


@pytest.mark.parametrize(
    ("threads", "worker_cpus", "workers", "wrong"),
    [(8, None, None, False), (9, None, None, True), (2, 2.0, 4, False), (2, 1.0, 8, True), (2, 1.0, 4, False)],
)
def test_threads_of_all_processes_must_fit_the_cores(threads, worker_cpus, workers, wrong):
    line = judge.threads(nodes(threads=threads), worker_cpus, workers)
    assert bool(line.remedy) is wrong, line
    if wrong:
        assert f"OMP_NUM_THREADS={threads} on 10.0.0.2" in line.detail


def test_resources_against_the_run():
    assert not judge.resources(8, 0, None).remedy
    run = from_mapping({"train": {"workers": 4, "global_batch": 256, "micro_batch": 32}})
    line = judge.resources(8, 0, run)
    assert not line.remedy
    assert "4 workers of 1 CPUs" in line.detail
    line = judge.resources(1, 0, run)
    assert "does not fit this cluster" in line.detail
    assert "lower train.workers" in line.remedy
    gpus = from_mapping({"train": {"workers": 4, "use_gpu": True, "global_batch": 256, "micro_batch": 32}})
    assert "needs 4 GPUs" in judge.resources(64, 2, gpus).detail


@pytest.mark.parametrize(
    ("url", "status", "wrong"),
    [
        ("http://10.0.0.1:8265", 200, True),
        ("http://34.1.2.3:8265", 200, True),
        ("http://head.example.com:8265", 200, True),
        ("http://[2001:db8::1]:8265", 200, True),
        ("http://34.1.2.3:8265", 401, False),
        ("http://127.0.0.1:8265", 200, False),
        ("http://[::1]:8265", 200, False),
        ("http://localhost:8265", 200, False),
        ("http://34.1.2.3:8265", None, False),
        ("", None, True),
    ],
)
def test_a_dashboard_that_answers_strangers_is_refused(url, status, wrong):
    line = judge.dashboard(url, status)
    assert bool(line.remedy) is wrong
    if url and wrong:
        assert "requires no token" in line.detail
        assert "RAY_AUTH_MODE=token" in line.remedy
    assert line.verdict == ("WRONG" if wrong else "not known" if status is None else "ok")


def test_nodes_that_may_come_are_mentioned():
    assert judge.nodes([NODE], {}, 8).detail == "1 of 1 ran a task"
    assert "24 more CPUs" in judge.nodes([NODE], {}, 32).detail


def test_storage_that_one_node_cannot_use_is_named():
    sentence = "There is no bucket gs://b; create it, or correct the URI gs://b/runs."
    line = judge.storage("run.storage", "gs://b/runs", nodes(storage_faults={"run.storage": sentence}))
    assert line.detail == "There is no bucket gs://b (on 10.0.0.2)"
    assert line.remedy == "create it, or correct the URI gs://b/runs"
    assert not judge.storage("data.shards", "gs://b/s", nodes(storage_faults={"run.storage": sentence})).remedy
