import os
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from raybert import cluster
from raybert.cluster import LIMITS, connection, find, limits_of, plan_shares, stated_limits
from raybert.config import from_mapping
from raybert.errors import InputError, RunFailed
from raybert.train.check import check_probe_gpus


def test_several_processes_of_probes_have_room_beside_the_workers():
    one, three = plan_shares(6, 0, workers=2), plan_shares(6, 0, workers=2, probes=3)
    assert (one.worker, one.probe) == (three.worker, three.probe) == (1, 1)
    assert plan_shares(5, 0, workers=2).probe == 1
    small = plan_shares(5, 0, workers=2, probes=3)
    assert 2 * small.worker + 2 * small.data_task + 3 * small.probe <= 5
    given = plan_shares(4, 0, workers=1, probe_cpus=1, probes=3)
    assert given.worker + given.data_task + 3 * given.probe <= 4


@given(cpus=st.floats(1, 1000), workers=st.integers(1, 128), reserved=st.floats(0, 0.5))
def test_a_plan_always_fits_with_a_data_task_and_a_probe(cpus, workers, reserved):
    try:
        shares = plan_shares(cpus, 0, workers=workers, reserved=reserved)
    except InputError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert cpus - reserved < workers + 2, "a cluster with room for everything was refused"
        assert "\n" not in refused
        return
    data_tasks = 1 if shares.data_task == 1 else 2
    assert workers * shares.worker + data_tasks * shares.data_task + shares.probe <= cpus - reserved + 1e-6
    assert 0 < shares.worker <= 1


def test_two_workers_run_on_a_laptop_of_two_cores():
    shares = plan_shares(2, 0, workers=2)
    assert shares.worker == 0.5
    assert not shares.use_gpu


def test_a_trial_of_a_sweep_runs_on_one_core():
    shares = plan_shares(1, 0, workers=1, reserved=0.01)
    assert shares.worker >= 0.25
    assert shares.worker + 2 * shares.data_task + shares.probe + 0.01 <= 1


def test_a_share_that_was_given_may_make_a_probe_wait_but_never_a_worker():
    assert plan_shares(2, 0, workers=1, probe_cpus=2).worker == 1
    shares = plan_shares(2, 0, workers=1, task_cpus=1.5)
    assert shares.worker + shares.data_task <= 2


@pytest.mark.parametrize(
    ("cpus", "given", "sentence"),
    [
        (4, {"probe_cpus": 100}, r"^probe.cpus=100 needs more CPUs .* \(4 at most\); lower probe.cpus"),
        (2, {"probe_cpus": 3}, "^probe.cpus=3 "),
        (2, {"task_cpus": 2}, "^data.task_cpus=2 leaves too few CPUs for train.workers=1"),
        (2, {"task_cpus": 4}, "^data.task_cpus=4 needs more CPUs"),
        (2, {"worker_cpus": 2}, "lower train.worker_cpus"),
        (2, {"probes": 20}, "^probe.workers=20 leaves too few CPUs for train.workers=1"),
        (0.5, {}, "too few for one worker"),
    ],
)
def test_the_setting_that_does_not_fit_is_the_one_that_is_named(cpus, given, sentence):
    with pytest.raises(InputError, match=sentence) as refused:
        plan_shares(cpus, 0, workers=1, **given)
    assert "lower train.workers" not in str(refused.value)


def test_what_can_never_be_placed_is_refused_with_numbers():
    with pytest.raises(InputError, match=r"train.workers=64 .* at most 2 CPUs, enough for 5 workers"):
        plan_shares(2, 0, workers=64)
    with pytest.raises(InputError, match="2 workers of 1 CPUs and a data task"):
        plan_shares(2, 0, workers=2, worker_cpus=1.0)
    with pytest.raises(InputError, match="needs 4 GPUs, but the cluster can have at most 2"):
        plan_shares(64, 2, workers=4, use_gpu=True)


def test_gpus_are_used_where_every_worker_gets_one():
    assert plan_shares(16, 2, workers=2).use_gpu
    assert not plan_shares(16, 1, workers=2).use_gpu


def test_a_cluster_files_limits_count_the_head_and_every_group():
    groups = {"head": {"resources": {"CPU": 4}}, "cpu": {"resources": {"CPU": 8}, "max_workers": 3}}
    groups["gpu"] = {"resources": {"CPU": 2, "GPU": 1}, "max_workers": 5}
    file = {"max_workers": 9, "head_node_type": "head", "available_node_types": groups}
    file["available_node_types"]["head"]["max_workers"] = 0
    assert limits_of(file) == {"CPU": 4 + 24 + 10, "GPU": 5}


def test_limits_may_be_stated_and_must_be_numbers(monkeypatch):
    monkeypatch.delenv(LIMITS, raising=False)
    assert stated_limits() is None
    monkeypatch.setenv(LIMITS, '{"CPU": 96, "GPU": 8}')
    assert stated_limits() == {"CPU": 96, "GPU": 8}
    for wrong in ("96", "[1]", "CPU=96", '{"CPU": "many"}'):
        monkeypatch.setenv(LIMITS, wrong)
        with pytest.raises(InputError, match=LIMITS):
            stated_limits()


def test_a_probe_that_could_only_wait_for_the_workers_gpus_is_refused():
    config = from_mapping({"train": {"workers": 2}, "probe": {"gpus": 0.5}})
    check_probe_gpus(config, plan_shares(16, 3, workers=2), gpus=3)
    check_probe_gpus(config, plan_shares(16, 2, workers=2, use_gpu=False), gpus=2)
    with pytest.raises(InputError, match=r"probe\.gpus=0\.5 does not fit alongside 2 workers"):
        check_probe_gpus(config, plan_shares(16, 2, workers=2), gpus=2)


def test_without_a_ray_none_is_started(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", Mock())
    for addresses, sentence in (([], "No Ray is running"), (["a:1", "b:2"], r"More than one .* \(a:1, b:2\)")):
        monkeypatch.setattr(connection, "local_addresses", lambda found=addresses: found)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        with pytest.raises(InputError, match=sentence):
            find()
    monkeypatch.setattr(connection, "local_addresses", lambda: ["a:1"])
    find()
    assert [call.kwargs["address"] for call in ray.init.call_args_list] == ["a:1"]


def test_what_a_local_ray_is_told_does_not_hold_for_a_cluster(monkeypatch):
    """A run on a cluster must be told of a node that is about to go, whatever this process did before."""
    watch, tracking = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_ENABLE_STATE_TRACKING"
    environment = {tracking: "1"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(connection, "_require_listener", lambda address: None)
    monkeypatch.setattr(connection, "_refuse_spot_node", lambda: None)
    assert cluster.connect()
    assert (environment[watch], environment[tracking]) == ("0", "1")
    environment["RAY_ADDRESS"] = "127.0.0.1:6379"
    assert not cluster.connect()
    assert watch not in environment
    assert environment[tracking] == "1"


@pytest.fixture
def started(monkeypatch):
    """What a local Ray would be started with."""
    calls = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: calls.append(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the tests' own Ray goes on
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return calls


def test_a_local_ray_is_one_of_its_own_with_two_cpus_at_least(started):
    assert cluster.connect()
    assert (started[0]["address"], started[0]["num_cpus"]) == ("local", max(2, os.cpu_count()))


def test_a_ray_that_is_not_up_in_time_is_started_again(started, monkeypatch, caplog):
    failures = [Exception("The current node timed out during startup.")]

    def init(**settings):
        started.append(settings)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(ray, "init", init)
    assert cluster.connect()
    assert started[0] == started[1]
    assert "starting it again" in caplog.text
    monkeypatch.setattr(connection, "STARTS", 3)
    failures += [Exception("The current node timed out during startup.")] * 3
    monkeypatch.setattr(connection, "end_unstarted", lambda error: Path("/tmp/ray/s/logs"))
    with pytest.raises(RunFailed, match=r"in 3 attempts: .* raylet.out in /tmp/ray/s/logs"):
        cluster.connect()
    assert len(started) == 2 + 3
    failures += [ValueError("num_cpus")]
    with pytest.raises(RunFailed, match="num_cpus"):
        cluster.connect()
    assert len(started) == 2 + 3 + 1, "only one that took too long is started again"


def test_where_tmpdir_has_too_long_a_path_ray_s_files_go_elsewhere(started, tmp_path, caplog):
    folder = tmp_path / ("long" * 20)
    os.environ["TMPDIR"] = str(folder)
    assert cluster.connect()
    assert os.environ["RAY_TMPDIR"] == "/tmp"
    assert f"TMPDIR={folder} is too long for Ray's sockets" in caplog.text
    assert not folder.exists()


def test_a_directory_that_was_chosen_for_ray_with_too_long_a_path_is_a_sentence(started, tmp_path):
    os.environ["RAY_TMPDIR"] = str(tmp_path / ("long" * 20))
    with pytest.raises(InputError, match=r"RAY_TMPDIR=.*long is \d+ bytes too long for the sockets .* RAY_TMPDIR=/tmp"):
        cluster.connect()
    assert not started


def test_the_sockets_of_this_ray_are_those_that_are_measured():
    """Every one of the dashboard's processes has one; beside them there are `raylet` and `plasma_store`."""
    from ray.dashboard.subprocesses.module import SubprocessModule
    from ray.dashboard.utils import get_all_modules

    names = [f"dash_{module.__name__}" for module in get_all_modules(SubprocessModule) if module.is_enabled()]
    assert "dash_JobHead" in names
    longest = max((*names, "plasma_store"), key=len)
    assert len(longest) == len(os.path.basename(connection.SOCKET)), longest


@pytest.mark.parametrize("made", ["a file", "below a file", "without permission"])
def test_a_temporary_directory_that_cannot_be_written_is_a_sentence(started, made):
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp") as short:
        folder = Path(short)
        if made == "without permission":
            if os.geteuid() == 0:
                pytest.skip("root can write everything")
            folder.chmod(0o500)
        else:
            (folder / "file").touch()
            folder = folder / "file" / ("x" if made == "below a file" else "")
        os.environ["TMPDIR"] = str(folder)
        with pytest.raises(InputError, match=r"Ray cannot keep its files in TMPDIR=.*; set RAY_TMPDIR"):
            cluster.connect()
        assert not started
