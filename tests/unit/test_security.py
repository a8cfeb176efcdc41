"""Files that carry code, planted wherever raybert reads a file: nothing of them runs, and each is a sentence."""

import io
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raybert import config, storage
from raybert.config import load_run
from raybert.data.shards import open_shards, read_unit, verify_shards
from raybert.encode.encoders import open_encoder
from raybert.errors import InputError
from raybert.export.directories import import_dir
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.files import load
from raybert.probe.service import queue
from raybert.probe.tasks import load_task
from raybert.report.read import read_run
from raybert.train.checkpoint import load_state, snapshot, write
from tests.data import make_shards
from tests.runs import make_run

CONFIG = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


class Evil:
    """Pickled, it is the order to make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mknod, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """The file that appears when planted code runs. The plant itself is known to work."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()
    mark.unlink()
    yield mark
    assert not mark.exists(), "code in a planted file was run"


@pytest.fixture
def plants(mark):
    """The same order in every form that a loader of pickles takes."""
    archive = io.BytesIO()
    torch.save({"format": 1, "optimizer": Evil(mark)}, archive)
    legacy = io.BytesIO()
    torch.save({"format": 1, "optimizer": Evil(mark)}, legacy, _use_new_zipfile_serialization=False)
    return {
        "pickle": pickle.dumps(Evil(mark)),
        "text pickle": pickle.dumps(Evil(mark), protocol=0),
        "archive": archive.getvalue(),
        "legacy": legacy.getvalue(),
        "yaml": f"!!python/object/apply:os.mknod ['{mark}']\n".encode(),
        "yaml below": f"name: x\ntrain: !!python/object/apply:os.mknod ['{mark}']\n".encode(),
    }


def refused(act, where):
    with pytest.raises(InputError) as error:
        act()
    said = str(error.value)
    assert "\n" not in said, said
    assert str(where) in said, said


def test_a_planted_checkpoint(plants, tmp_path):
    torch.manual_seed(0)
    model = Bert(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    place = tmp_path / "c"
    write(snapshot(model, optimizer, step=1), str(place))
    assert load_state(place)["step"] == 1
    for plant in plants.values():
        (place / "training_state.pt").write_bytes(plant)
        refused(lambda: load_state(place), place)
        for name in ("model.safetensors", "config.json"):
            write(snapshot(model), str(place))
            (place / name).write_bytes(plant)
            refused(lambda: load(str(place)), place)
            refused(lambda: open_encoder(str(place)), place)
        # What other libraries would open beside, or instead of, safetensors.
        (place / "model.safetensors").unlink()
        (place / "pytorch_model.bin").write_bytes(plant)
        (place / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForPreTraining"]}')
        (place / "tokenizer_config.json").write_text("{}")
        refused(lambda: open_encoder(str(place)), place)
        refused(lambda: import_dir(str(place), str(tmp_path / "out")), place)


def test_a_planted_task_or_config(plants, tmp_path):
    for plant in plants.values():
        for name in ("task.yaml", "task.yml", "config.yaml"):
            (tmp_path / name).write_bytes(plant)
        refused(lambda: load_task(str(tmp_path / "task.yaml")), tmp_path)
        refused(lambda: load_task(str(tmp_path / "task.yml")), tmp_path)
        refused(lambda: config.load(str(tmp_path / "config.yaml")), "config" if plant.startswith(b"name") else tmp_path)
        for name in ("x.parquet", "x.csv", "x.jsonl", "x.pkl"):
            (tmp_path / name).write_bytes(plant)
            (tmp_path / "good.yaml").write_text(f"name: t\ntrain: {tmp_path / name}\ntext: text\nlabel: label\n")
            refused(lambda: load_task(str(tmp_path / "good.yaml")), tmp_path / name)


def test_a_planted_manifest_or_shard(plants, tmp_path):
    shards = make_shards(str(tmp_path / "shards"))
    unit = shards.units()[0]
    for plant in plants.values():
        storage.write_bytes(f"{shards.uri}/{unit.shard}", plant)
        refused(lambda: verify_shards(shards), unit.shard)
        refused(lambda: verify_shards(shards, sizes_only=True), unit.shard)
        with pytest.raises((InputError, pa.ArrowException)):
            read_unit(shards.uri, unit, shards.vocabulary)
        storage.write_bytes(f"{shards.uri}/manifest.json", plant)
        refused(lambda: open_shards(shards.uri), shards.uri)


def test_a_planted_run_directory(plants, tmp_path):
    run = make_run(tmp_path, steps=200)
    for plant in plants.values():
        for name in ("metrics.jsonl", "failure.json"):
            storage.write_bytes(f"{run}/{name}", plant)
        storage.write_bytes(f"{run}/probes/queue/step-00000010.json", plant)
        refused(lambda: queue.read_entry(run, 10), run)
        storage.write_bytes(f"{run}/config.yaml", plant)
        if not plant.startswith(b"name"):
            refused(lambda: load_run(run), run)
            assert "config.yaml" in [part.file for part in read_run(run).left_out]


def test_a_parquet_file_with_a_pickle_in_its_metadata(mark, tmp_path):
    table = pa.table({"text": ["a"] * 4, "label": [0, 1, 0, 1]})
    table = table.replace_schema_metadata({b"pandas": pickle.dumps(Evil(mark))})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "task.yaml").write_text(f"name: t\ntrain: {tmp_path / 'x.parquet'}\n")
    assert load_task(str(tmp_path / "task.yaml")).name == "t"
