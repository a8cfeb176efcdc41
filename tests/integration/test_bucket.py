"""Text to report with every path in a bucket, through a server that fails: the result is that of a clean run."""

import io
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from raybert import storage
from raybert.cli import run_app
from raybert.telemetry import read_metrics
from tests.gcs import Fault
from tests.integration.test_prepare import document
from tests.tasks import make_task

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 12

# What a bucket does on a bad day. A struck request costs a second or two of waiting before it is made again.
FAULTS = [
    Fault("status", every=31, burst=2, status=503),
    Fault("status", every=37, burst=2, status=429),
    Fault("cut", match="alt=media", every=17),
    Fault("refuse", match="^(POST|PUT) /upload", every=13),
    Fault("lost", match="^(POST|PUT) /upload", every=11),
    Fault("slow", every=41, seconds=2.0),
]


def put_inputs(bucket, folder):
    """Raw texts and a probe task in the bucket."""
    texts = [document(i) for i in range(60)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts[:30]}), sink)
    storage.write_bytes(f"{bucket}/raw/a.parquet", sink.getvalue())
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[30:])
    storage.write_bytes(f"{bucket}/raw/deep/b.jsonl", lines.encode())
    task = storage.read_bytes(make_task(folder)).decode().replace(str(folder), f"{bucket}/task")
    for name in ("train.csv", "test.csv"):
        storage.upload_file(folder / name, f"{bucket}/task/{name}")
    storage.write_bytes(f"{bucket}/task/mine.yaml", task.encode())


def settings(bucket):
    return {
        "run": {"name": "r", "storage": f"{bucket}/runs"},
        "data": {"shards": f"{bucket}/shards"},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 48},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "workers": 2, "dtype": "float32"},
        "schedule": {"warmup_steps": 2},
        "every": {"log": 1, "validation": 6, "probe": 6, "checkpoint": 4},
        "checkpoint": {"keep_last": 1},
        "validation": {"samples": 8},
        "probe": {"tasks": [f"{bucket}/task/mine.yaml"]},
    }


def whole_way(bucket):
    """prepare, pretrain, probe, report, as commands; every path of theirs is in the bucket."""
    prepare = ["prepare", "--input", f"{bucket}/raw", "--output", f"{bucket}/shards", "--seq-len", "48"]
    assert run_app([*prepare, "--validation-fraction", "0.2"]) == 0
    storage.write_bytes(f"{bucket}/config.yaml", yaml.safe_dump(settings(bucket)).encode())
    assert run_app(["pretrain", f"{bucket}/config.yaml"]) == 0
    run = f"{bucket}/runs/r"
    assert run_app(["probe", "wait", run, "--timeout", "100"]) == 0
    assert run_app(["report", run]) == 0
    return run


@pytest.fixture(scope="module")
def clean(gcs, tmp_path_factory):
    bucket = gcs.create_bucket("clean")
    put_inputs(bucket, tmp_path_factory.mktemp("task"))
    return whole_way(bucket)


def names(uri):
    return [name.removeprefix(uri) for name in storage.list_files(uri)]


def test_a_run_in_a_bucket_has_what_a_local_one_has(clean):
    found = names(clean)
    assert [n for n in found if n.startswith("/checkpoints/step")] == [
        f"/checkpoints/step-{STEPS:08d}/{name}" for name in ("config.json", "model.safetensors", "training_state.pt")
    ]
    assert "/checkpoints/best/model.safetensors" in found
    assert [record["step"] for record in read_metrics(clean) if "loss" in record] == list(range(1, STEPS + 1))
    for step in (6, 12):
        assert storage.read_json(f"{clean}/probes/mine-{step:08d}.json")["status"] == "done"
    assert not [n for n in found if n.startswith(("/probes/queue/", "/probes/weights/"))]
    assert storage.read_bytes(f"{clean}/report.html").startswith(b"<!")


def test_a_bucket_that_fails_now_and_then_changes_no_byte(clean, gcs, tmp_path):
    bucket = gcs.create_bucket("faulty")
    put_inputs(bucket, tmp_path)
    gcs.inject(*FAULTS)
    start = time.monotonic()
    try:
        run = whole_way(bucket)
        injected = gcs.injected()
        print(injected, gcs.requests(), time.monotonic() - start)
    finally:
        gcs.inject()
    assert injected.keys() == {"503", "429", "cut", "refuse", "lost", "slow"}, injected
    for name in names("gs://clean/shards"):
        assert storage.read_bytes(f"gs://clean/shards{name}") == storage.read_bytes(f"{bucket}/shards{name}"), name
    assert names(run) == names(clean)
    for name in names(f"{clean}/checkpoints"):
        ours, theirs = (storage.read_bytes(f"{where}/checkpoints{name}") for where in (clean, run))
        if name.endswith("training_state.pt"):
            ours, theirs = (torch.load(io.BytesIO(data), weights_only=True) for data in (ours, theirs))
            assert same(ours["optimizer"], theirs["optimizer"])
        else:
            assert ours == theirs, name
    keys = ("step", "loss", "mlm_loss", "nsp_loss", "lr", "grad_norm", "samples", "validation")
    logs = [[[record.get(key) for key in keys] for record in read_metrics(where)] for where in (clean, run)]
    assert logs[0] == logs[1]
    for step in (6, 12):
        probes = [storage.read_json(f"{where}/probes/mine-{step:08d}.json") for where in (clean, run)]
        assert probes[0]["mean"] == probes[1]["mean"]


def same(a, b):
    """Nested values with tensors in them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
