import threading

import pytest
import torch

from raybert import storage
from raybert.errors import InputError
from raybert.model import optimizer
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.directory import verify_files
from raybert.model.files import load, save
from raybert.model.losses import Pretraining
from raybert.train.checkpoint import BackgroundWriter, load_state, snapshot, write

CONFIG = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Bert(CONFIG)


def test_a_snapshot_does_not_change_while_training_goes_on(model, tmp_path):
    adam = optimizer.build(model, lr=1e-3, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-6)
    model.encode(torch.ones(1, 4, dtype=torch.long))[0].sum().backward()
    adam.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    snap = snapshot(Pretraining(model), adam, step=7)
    adam.step()
    write(snap, str(tmp_path / "c"))
    for name, value in load(str(tmp_path / "c")).state_dict().items():
        assert torch.equal(value, before[name])
    state = load_state(tmp_path / "c")
    assert state["step"] == 7
    adam.load_state_dict(state["optimizer"])


def test_a_checkpoint_is_there_whole_or_not_at_all(model, tmp_path):
    write(snapshot(model), str(tmp_path / "c"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
    # A second write under the same name (an attempt that was cut off before) replaces it.
    write(snapshot(model), str(tmp_path / "c"))
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["SHA256SUMS", "config.json", "model.safetensors"]


def test_remote_checkpoints_round_trip(model):
    save(model, "memory://checkpoints/a")
    found = load("memory://checkpoints/a")
    assert found.config == CONFIG
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))


def test_weights_alone_are_no_training_state(model, tmp_path):
    save(model, str(tmp_path / "c"))
    with pytest.raises(InputError, match="contains only weights"):
        load_state(tmp_path / "c")


def test_a_damaged_checkpoint_names_the_fault(model, tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        load(str(tmp_path / "none"))
    save(model, str(tmp_path / "c"))
    (tmp_path / "c" / "config.json").write_text((tmp_path / "c" / "config.json").read_text().replace("16", "32"))
    with pytest.raises(InputError, match="has shape"):
        load(str(tmp_path / "c"))
    (tmp_path / "c" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="raybert import"):
        load(str(tmp_path / "c"))


def test_the_writer_runs_jobs_in_order_and_raises_their_faults():
    writer, gate, done = BackgroundWriter(), threading.Event(), []
    writer.submit(lambda: (gate.wait(), done.append(1)))
    writer.submit(lambda: done.append(2))
    assert done == []
    gate.set()
    writer.close()
    assert done == [1, 2]
    late = threading.Thread(target=writer.drain, daemon=True)  # an upload that ends after the loop
    late.start()
    late.join(10)
    assert not late.is_alive(), "a closed writer has something left to wait for"
    writer = BackgroundWriter()
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.close()


def test_a_checkpoint_in_a_bucket_that_was_cut_off_is_none(model, gcs, monkeypatch):
    uri = gcs.create_bucket("cut-off") + "/c"
    snap = snapshot(model, optimizer.build(model, lr=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-6), step=1)
    upload, sent = storage.upload_file, []

    def two_files(local, to):
        if len(sent) == 2:
            raise KeyboardInterrupt  # the process ends here
        sent.append(to)
        upload(local, to)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload_file", two_files)
        with pytest.raises(KeyboardInterrupt):
            write(snap, uri)
    assert storage.list_files(uri) == sorted(sent)
    with pytest.raises(InputError, match=r"config\.json"):
        load(uri)
    with pytest.raises(InputError):
        verify_files(uri)
    write(snap, uri)
    verify_files(uri)
    assert load(uri).config == model.config
