"""What the trackers were told, read back by their own readers."""

import json
import logging
import random
import resource
import struct
from pathlib import Path

import pytest
import yaml

from raybert import storage
from raybert.config import from_mapping
from raybert.errors import InputError
from raybert.report import trackers
from raybert.train.check import _check_trackers
from tests.runs import make_run, probe, record, write_probe


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return make_run(tmp_path, steps=100, done=60, log_every=10, validation_every=30, probe_every=30)


def losses(run):
    return {r["step"]: r["loss"] for r in map(json.loads, Path(run, "metrics.jsonl").open()) if "loss" in r}


def settings(run, *names):
    tree = yaml.safe_load(Path(run, "config.yaml").read_text())
    tree.pop("about")
    tree["run"]["trackers"] = list(names)
    return tree


def follow(run, *names):
    """Follow a run that was begun already, and that gets two records and a probe more meanwhile."""
    with trackers.following(from_mapping(settings(run, *names))), Path(run, "metrics.jsonl").open("a") as file:
        last = max(losses(run))
        for step in (last + 10, last + 20):
            file.write(json.dumps(record(step, 100, random.Random(step))) + "\n")
        write_probe(run, probe("bbc_news", last + 10, 100))


def test_tensorboard_holds_every_figure_once(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(run, "tensorboard")
    follow(run, "tensorboard")  # another start of the driver
    events = EventAccumulator(str(Path(run, "tensorboard")))
    events.Reload()
    found = {e.step: e.value for e in events.Scalars("train/loss")}
    assert len(events.Scalars("train/loss")) == len(found)
    assert found == pytest.approx(losses(run))
    assert [e.step for e in events.Scalars("validation/mlm_loss")] == [0, 30, 60]
    assert [e.step for e in events.Scalars("probe/bbc_news/mean")] == [30, 60, 70, 90]
    tags = events.Tags()["scalars"]
    wanted = {"machine/tokens_per_second", "machine/wait_data", "train/lr"}
    assert wanted | {f"probe/bbc_news/{name}" for name in ("mean_untrained", "tfidf", "majority")} <= set(tags)


def test_tensorboard_outlives_a_full_disk(tmp_path, caplog, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(trackers, "FLUSH_INTERVAL", 0.0)
    board = trackers.TensorBoard(str(tmp_path), {"seed": 1})
    board.log(1, {"train/loss": 3.0})
    board.flush_if_due()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # as a disk that takes no more
    try:
        for step in range(2, 1000):
            board.log(step, {"train/loss": 2.0})
            board.flush_if_due()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    board.log(1000, {"train/loss": 1.0})
    board.close()
    assert caplog.text.count("Cannot write TensorBoard's file") == 1
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "a file was begun that could not be written"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {e.step: e.value for e in events.Scalars("train/loss")}
    assert found == {1: 3.0, 1000: 1.0}


def test_what_is_written_beside_a_remote_run_reaches_the_bucket(run, tmp_path):
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in (path for path in Path(run).rglob("*") if path.is_file()):
        storage.write_bytes(f"memory://bucket/runs/bbc-tiny/{path.relative_to(run).as_posix()}", path.read_bytes())
    tree = settings(run, "tensorboard", "wandb")
    tree["run"]["storage"] = "memory://bucket/runs"
    with trackers.following(from_mapping(tree)):
        pass
    for file in storage.list_files("memory://bucket/runs/bbc-tiny"):
        if "/tensorboard/" in file or file.endswith(".wandb"):
            (tmp_path / file.rpartition("/")[2]).write_bytes(storage.read_bytes(file))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(losses(run))
    (offline,) = tmp_path.glob("*.wandb")
    assert {row["step"] for row in wandb_history(offline) if "train/loss" in row} == set(losses(run))


def test_mlflow_goes_on_in_the_same_run(run):
    mlflow = pytest.importorskip("mlflow")
    follow(run, "mlflow")
    follow(run, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("raybert").experiment_id])
    assert len(found) == 1
    assert found[0].info.status == "FINISHED"
    assert found[0].data.params["optimizer.lr"] == "0.0006"
    history = client.get_metric_history(found[0].info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == pytest.approx(losses(run))
    assert len(history) == len(losses(run))
    probes = client.get_metric_history(found[0].info.run_id, "probe/bbc_news/mean")
    assert sorted(metric.step for metric in probes) == [30, 60, 70, 90]


def test_wandb_offline_holds_every_figure(run):
    pytest.importorskip("wandb")
    follow(run, "wandb")
    (path,) = Path(run, "wandb").glob("offline-run-*/*.wandb")
    rows = list(wandb_history(path))
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == pytest.approx(losses(run))
    assert [row["step"] for row in rows if "probe/bbc_news/mean" in row] == [30, 60, 70]


def wandb_history(path):
    """Rows of a .wandb file: records of W&B's own protobuf, framed as in LevelDB's log after 7 bytes of its own.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (32768 - place % 32768) < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            found, whole = Record.FromString(whole), b""
            if found.HasField("history"):
                items = found.history.item
                yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_a_tracker_that_fails_does_no_harm(run, monkeypatch, caplog):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(trackers.TensorBoard, "log", full)
    with caplog.at_level(logging.WARNING):
        follow(run, "tensorboard")
    assert caplog.text.count("tensorboard failed and is disabled until the run is resumed: No space left") == 1


def test_a_tracker_that_cannot_work_is_refused_early(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
        _check_trackers(from_mapping({"run": {"storage": "gs://bucket", "trackers": ["mlflow"]}}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'raybert\[wandb\]'"):
        _check_trackers(from_mapping({"run": {"trackers": ["wandb"]}}))
