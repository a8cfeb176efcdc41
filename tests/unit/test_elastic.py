"""How many workers an elastic run has, and when it changes that number."""

import json

from raybert.ray_internals.names import SNAPSHOT
from raybert.train.recovery import faults
from raybert.train.recovery.elastic import CheckpointedResizing, fitting_workers


def test_elastic_numbers_of_workers():
    one = {"CPU": 1.0}

    def fit(*cpus, worker=one, data=1.0, allowed=(1, 2, 3, 4, 6)):
        nodes = [{"CPU": float(c)} for c in cpus]
        return fitting_workers(nodes, worker, allowed=allowed, data_cpus=data, total_cpus=sum(cpus))

    assert fit(1, 1, 1) == 2, "one CPU is left for data"
    assert fit(4, 4) == 6
    assert fit(3, 3) == 4, "five do not divide the batch"
    assert fit(1) == 0
    assert fit(0.3, 0.3, worker={"CPU": 0.1}, data=0.0) == 6
    assert fit(2, 2, worker={"CPU": 1.5}, data=0.5) == 2
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}]
    assert fitting_workers(nodes, {"CPU": 1.0, "GPU": 1.0}, allowed=[1, 2, 4], data_cpus=1, total_cpus=16) == 2


def commit(run, step):
    """Note a checkpoint as Ray Train does, with what is read of its record."""
    newest = {"checkpoint_dir_name": f"checkpoints/step-{step:08d}"}
    (run / SNAPSHOT).write_text(json.dumps({"latest_checkpoint_result": newest}))


def test_a_run_grows_at_the_next_checkpoint(tmp_path):
    commit(tmp_path, 30)
    resizing = CheckpointedResizing(str(tmp_path), [1, 2, 3], 1.0, resize_seconds=0.0)
    assert resizing.accepts(2, 2), "nothing changes"
    assert [resizing.accepts(2, 3) for _ in range(3)] == [False] * 3
    commit(tmp_path, 40)
    assert resizing.accepts(2, 3)
    assert [fault["workers"] for fault in faults.read_faults(str(tmp_path))[0]] == [3]
    assert not resizing.accepts(3, 4), "the next change waits for a checkpoint of its own"


def test_a_run_shrinks_at_the_next_checkpoint_or_when_none_comes(tmp_path):
    commit(tmp_path, 30)
    assert CheckpointedResizing(str(tmp_path), [1, 2], 1.0, resize_seconds=0.0).accepts(2, 1)
    resizing = CheckpointedResizing(str(tmp_path), [1, 2], 1.0, resize_seconds=1000.0)
    assert not resizing.accepts(2, 1)
    commit(tmp_path, 40)
    assert resizing.accepts(2, 1)
