"""`raybert doctor` on the real local Ray, with storage in a bucket."""

import pytest
import yaml

from raybert import storage
from raybert.cli import run_app
from tests.data import make_shards

pytestmark = pytest.mark.usefixtures("ray_cluster")
SUBJECTS = ["dashboard", "resources", "nodes", "python", "ray", "torch", "raybert", "clocks", "/dev/shm", "threads"]


def examined(capsys, *arguments):
    """(exit code, what was said by subject)."""
    code = run_app(["doctor", *arguments])
    captured = capsys.readouterr()
    lines = [line.strip() for line in captured.out.splitlines() if "what to do:" not in line]
    assert code == (1 if any("  WRONG: " in line for line in lines) else 0), captured.err
    return code, dict(line.split("  ", 1) for line in lines), captured.out


def test_a_cluster_that_is_fit_and_one_that_is_not(gcs, tmp_path, capsys):
    _, said, _ = examined(capsys)
    assert list(said) == SUBJECTS
    bucket = gcs.create_bucket("doctor")
    shards = make_shards(f"{bucket}/shards")
    tree = {
        "run": {"storage": f"{bucket}/runs"},
        "data": {"shards": shards.uri},
        "train": {"workers": 2, "global_batch": 8, "micro_batch": 2},
    }
    storage.write_bytes(f"{bucket}/c.yaml", yaml.safe_dump(tree).encode())
    before = storage.list_files(bucket)
    _, said, _ = examined(capsys, f"{bucket}/c.yaml")
    assert list(said) == [*SUBJECTS, "run.storage", "data.shards"]
    # How large /dev/shm is depends on where the tests run.
    assert {subject for subject, line in said.items() if not line.startswith("ok")} <= {"/dev/shm"}, said
    assert storage.list_files(bucket) == before

    wrong = ["run.storage=gs://none/runs", "data.shards=gs://doctor/nothing"]
    wrong += ["train.workers=2000", "train.global_batch=4000"]
    code, said, out = examined(capsys, f"{bucket}/c.yaml", *wrong)
    assert code == 1
    assert said["run.storage"] == "WRONG: There is no bucket gs://none"
    assert "gs://doctor/nothing is not a shard set" in said["data.shards"]
    assert "train.workers=2000 does not fit this cluster" in said["resources"]
    assert "what to do: create it, or correct the URI" in out
    assert run_app(["doctor", str(tmp_path / "none.yaml")]) == 2
