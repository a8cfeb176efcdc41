"""Text to report with every path in a bucket, through a server that fails: the result is that of a clean run."""

import contextlib
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from raybert import storage
from raybert.cli import run_app
from raybert.records import read_metrics
from tests.gcs import Fault
from tests.integration.test_prepare import document
from tests.tasks import make_task
from tests.waiting import LONGEST

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 12

# What a bucket does on a bad day. A struck request costs a second or two of waiting before it is made again.
FAULTS = [
    Fault("status", every=101, burst=2, status=503),
    Fault("status", every=113, burst=2, status=429),
    Fault("cut", match="alt=media", every=43),
    Fault("refuse", match="^(POST|PUT) /upload", every=31),
    Fault("lost", match="^(POST|PUT) /upload", every=29),
    Fault("slow", every=97, seconds=1.0),
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
    """prepare, pretrain, probe, report, as commands whose paths are all in the bucket; returns what they printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        prepare = ["prepare", "--input", f"{bucket}/raw", "--output", f"{bucket}/shards", "--seq-len", "48"]
        assert run_app([*prepare, "--validation-fraction", "0.2"]) == 0, out.getvalue()
        storage.write_bytes(f"{bucket}/config.yaml", yaml.safe_dump(settings(bucket)).encode())
        assert run_app(["pretrain", f"{bucket}/config.yaml"]) == 0, out.getvalue()
        assert run_app(["probe", "wait", f"{bucket}/runs/r", "--timeout", str(LONGEST)]) == 0, out.getvalue()
        assert run_app(["report", f"{bucket}/runs/r"]) == 0, out.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def said(gcs, tmp_path_factory):
    """What the commands of the clean run printed."""
    bucket = gcs.create_bucket("clean")
    put_inputs(bucket, tmp_path_factory.mktemp("task"))
    return whole_way(bucket)


@pytest.fixture(scope="module")
def clean(said):
    return "gs://clean/runs/r"


def names(uri):
    return [name.removeprefix(uri) for name in storage.list_files(uri)]


def test_a_run_in_a_bucket_has_what_a_local_one_has(clean):
    found = names(clean)
    kept = {name.split("/")[2] for name in found if name.startswith("/checkpoints/")}
    assert kept == {"best", f"step-{STEPS:08d}"}
    for name in ("config.json", "model.safetensors", "training_state.pt"):
        assert f"/checkpoints/step-{STEPS:08d}/{name}" in found
    assert "/checkpoints/best/model.safetensors" in found
    assert [record["step"] for record in read_metrics(clean) if "loss" in record] == list(range(1, STEPS + 1))
    for step in (6, 12):
        assert storage.read_json(f"{clean}/probes/mine-{step:08d}.json")["status"] == "done"
    assert not [n for n in found if n.startswith(("/probes/queue/", "/probes/weights/"))]
    assert storage.read_bytes(f"{clean}/report.html").startswith(b"<!")


def test_no_credential_is_written_anywhere(said, secrets, ray_cluster):
    """Not in the bucket, not in what commands print, not in the logs of any of Ray's processes."""
    places = {uri: storage.read_bytes(uri) for uri in storage.list_files("gs://clean")}
    assert "gs://clean/runs/r/config.yaml" in places
    places["what was printed"] = said.encode()
    logs = ray_cluster / "logs"
    places |= {str(path): path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert len(places) > 30
    for place, content in places.items():
        for secret in secrets:
            assert secret.encode() not in content, f"{place} holds a credential"


def test_a_bucket_that_fails_now_and_then_changes_no_byte(clean, gcs, tmp_path):
    bucket = gcs.create_bucket("faulty")
    put_inputs(bucket, tmp_path)
    gcs.inject(*FAULTS)
    try:
        whole_way(bucket)
        injected = gcs.injected()
    finally:
        gcs.inject()
    run = f"{bucket}/runs/r"
    assert injected.keys() == {"503", "429", "cut", "refuse", "lost", "slow"}, injected
    for name in names("gs://clean/shards"):
        assert storage.read_bytes(f"gs://clean/shards{name}") == storage.read_bytes(f"{bucket}/shards{name}"), name
    events = "/tensorboard/"  # whose files are named after the second
    assert [n for n in names(run) if events not in n] == [n for n in names(clean) if events not in n]
    for name in names(clean):
        if name.endswith(("model.safetensors", "config.json")) or name.startswith("/ledger/"):
            assert storage.read_bytes(f"{clean}{name}") == storage.read_bytes(f"{run}{name}"), name
    # The state holds seconds, too.
    path = f"checkpoints/step-{STEPS:08d}/training_state.pt"
    states = [
        torch.load(io.BytesIO(storage.read_bytes(f"{where}/{path}")), weights_only=True) for where in (clean, run)
    ]
    assert same(states[0]["optimizer"], states[1]["optimizer"])
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


@pytest.mark.parametrize(
    ("fault", "place", "sentence"),
    [
        (None, "gs://nobody-s", "There is no bucket gs://nobody-s; create it"),
        (Fault("status", match="b/clean", status=403, message="denied", every=1), "gs://clean", "403 Forbidden"),
        (Fault("status", match="b/clean", status=401, message="expired", every=1), "gs://clean", "401 Unauthorized"),
    ],
)
def test_what_a_bucket_refuses_is_a_sentence_before_anything_is_done(
    clean, gcs, tmp_path, capsys, fault, place, sentence
):
    (tmp_path / "a.txt").write_text(document(1))
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings("gs://clean") | {"probe": {"tasks": []}}))
    gcs.inject(*([fault] if fault else []))
    try:
        for arguments in (
            ["prepare", "--input", str(tmp_path / "a.txt"), "--output", f"{place}/new", "--seq-len", "48"],
            ["pretrain", str(config), f"run.storage={place}/new"],
            ["pretrain", str(config), f"run.storage={tmp_path}/new", f"data.shards={place}/shards"],
        ):
            assert run_app(arguments) == 2, arguments
            error = capsys.readouterr().err
            assert sentence in error
            assert "Traceback" not in error
    finally:
        gcs.inject()
    assert not (tmp_path / "new").exists()
    assert not [uri for uri in storage.list_files("gs://clean") if "/new" in uri]


def test_a_sweep_lives_in_a_bucket_and_is_resumed_from_it(clean, capsys):
    base = settings("gs://clean") | {"probe": {"tasks": []}, "checkpoint": {"keep_best": False}}
    del base["run"]
    base["train"] |= {"steps": 6, "workers": 1}
    sweep = {
        "name": "s",
        "storage": "gs://clean/sweeps",
        "base": base,
        "space": {"optimizer.lr": {"grid": [0.001]}},
        "asha": {"enabled": False},
    }
    storage.write_bytes("gs://clean/sweep.yaml", yaml.safe_dump(sweep).encode())
    assert run_app(["sweep", "gs://clean/sweep.yaml"]) == 0
    found = names("gs://clean/sweeps/s")
    assert {"/sweep.html", "/winner.yaml", "/summary.json", "/trials/trial-0000/metrics.jsonl"} <= set(found)
    assert [trial["status"] for trial in storage.read_json("gs://clean/sweeps/s/summary.json")] == ["finished"]
    before = storage.read_bytes("gs://clean/sweeps/s/trials/trial-0000/metrics.jsonl")
    assert run_app(["sweep", "gs://clean/sweep.yaml", "--resume"]) == 0
    assert storage.read_bytes("gs://clean/sweeps/s/trials/trial-0000/metrics.jsonl") == before
