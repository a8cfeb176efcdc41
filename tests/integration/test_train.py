"""Whole runs through TorchTrainer: the number of workers, a killed worker and a second run change no loss."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from raybert import storage
from raybert.cli import run_app
from raybert.config import from_mapping
from raybert.data.text import rows
from raybert.errors import InputError
from raybert.model.bert import Bert
from raybert.model.files import load
from raybert.model.initialise import WHITENED_GAIN
from raybert.probe.service import client, queue
from raybert.records import read_metrics
from raybert.report.page import write_report
from raybert.report.terminal import closing_table
from raybert.spectral import files as spectral_files
from raybert.spectral import table as spectral_table
from raybert.spectral.recipe import Recipe
from raybert.train.check import check
from raybert.train.checkpoint import load_state
from raybert.train.ledger import read_account
from raybert.train.run import train
from tests.data import make_shards
from tests.killed import train_with_a_kill
from tests.plain import train_plainly
from tests.tasks import make_task
from tests.waiting import LONGEST

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")))


def settings(folder, shards, name, **sections):
    tree = {
        "run": {"name": name, "storage": str(folder)},
        "data": {"shards": shards.uri},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32},
        "train": {"steps": STEPS, "global_batch": 12, "micro_batch": 3, "dtype": "float32"},
        "schedule": {"warmup_steps": 5},
        "every": {"log": 1, "validation": 20, "probe": 20, "checkpoint": 10},
        "checkpoint": {"keep_last": 1},
        "validation": {"samples": 30},
        "probe": {"tasks": []},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return from_mapping(tree)


@pytest.fixture(scope="module")
def alone(folder, shards, tmp_path_factory):
    """One worker, with probes."""
    task = make_task(tmp_path_factory.mktemp("task"))
    kept = {"keep_last": 1, "best": "mine.mean.test_accuracy"}
    run = check(settings(folder, shards, "alone", probe={"tasks": [task]}, checkpoint=kept))
    train(run)
    client.wait(run.uri, str(folder), timeout=LONGEST)
    return run.uri


def losses(uri):
    return np.array([record["loss"] for record in read_metrics(uri) if "loss" in record])


def test_a_run_leaves_what_is_promised(alone):
    records = [record for record in read_metrics(alone) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    wanted = "step loss mlm_loss nsp_loss lr grad_norm tokens_per_second mfu wait_data wait_checkpoint wait_report "
    assert set((wanted + "samples elapsed_seconds").split()) <= records[-1].keys()
    assert records[-1]["samples"] == STEPS * 12
    assert [r["step"] for r in read_metrics(alone) if "validation" in r] == [0, 20, 40, 60]
    kept = {os.path.basename(uri) for uri in storage.list_dir(f"{alone}/checkpoints")}
    assert kept == {f"step-{STEPS:08d}", "best"}
    assert load(f"{alone}/checkpoints/step-{STEPS:08d}").config.hidden_size == 16


def test_every_checkpoint_that_was_due_is_probed_though_one_is_kept(alone):
    found = queue.records(alone)
    assert list(found) == [f"mine-{step:08d}.json" for step in (20, 40, 60)]
    for record in found.values():
        assert record["status"] == "done", record
        assert {"majority", "untrained", "start", "tfidf"} == record["baselines"].keys()
        assert record["baselines"]["start"] == record["baselines"]["untrained"], "what a random run begins with"
    assert storage.list_dir(f"{alone}/probes/weights") == []
    best = max(found.values(), key=lambda record: (record["mean"]["test_accuracy"], -record["step"]))
    names = (f"step-{STEPS:08d}", "best")
    last, kept = (storage.read_bytes(f"{alone}/checkpoints/{name}/model.safetensors") for name in names)
    assert (kept == last) == (best["step"] == STEPS)


def test_the_report_and_the_table_tell_of_it(alone):
    page = storage.read_bytes(write_report(alone)).decode()
    assert "default-src 'none'" in page, "a browser must refuse to load anything from elsewhere"
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    console = Console(record=True, width=120)
    console.print(closing_table(alone))
    text = console.export_text()
    assert "untrained" in text
    assert "TF-IDF" in text


def test_verify_finds_nothing_wrong_and_a_changed_checkpoint(alone, capsys):
    assert run_app(["verify", alone]) == 0
    assert "WRONG" not in capsys.readouterr().out
    weights = f"{alone}/checkpoints/best/model.safetensors"
    content = storage.read_bytes(weights)
    flipped = bytearray(content)
    flipped[-10] ^= 1
    for damaged in (content[:-100], bytes(flipped)):
        storage.write_bytes(weights, damaged)
        assert run_app(["verify", alone]) == 1
        assert "WRONG" in capsys.readouterr().out
    storage.write_bytes(weights, content)
    state = f"{alone}/checkpoints/step-{STEPS:08d}/training_state.pt"
    content = storage.read_bytes(state)
    storage.remove(state)
    assert run_app(["verify", alone]) == 1
    assert "lacks training_state.pt" in " ".join(capsys.readouterr().out.split())
    storage.write_bytes(state, content)


def test_embed_as_a_job_goes_on_where_it_was_cut_off(alone, tmp_path, monkeypatch, capsys):
    texts = [f"text number {i}" for i in range(50)]
    pq.write_table(pa.table({"text": texts, "id": range(50)}), tmp_path / "in.parquet", row_group_size=10)
    monkeypatch.setattr(rows, "PIECE_BYTES", 100)
    out = tmp_path / "out"
    arguments = ["embed", f"{alone}/checkpoints/best", "--input", str(tmp_path / "in.parquet"), "--output", str(out)]
    assert run_app(arguments) == 0
    table = pq.read_table(out)
    assert table["id"].to_pylist() == list(range(50)), "the rows' order"
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), load_best(alone).embed(texts), atol=1e-5)
    parts = sorted(out.glob("part-*.parquet"))
    assert len(parts) == 5
    before = {part: part.stat().st_mtime_ns for part in parts}
    parts[3].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:-100])  # on a disk that was full, or a machine that lost its power
    assert run_app(arguments) == 0
    assert [part for part in parts if part.stat().st_mtime_ns != before[part]] == [parts[1], parts[3]]
    assert pq.read_table(out) == table
    assert run_app([*arguments, "--pooling", "cls"]) == 2
    assert "made with other settings (pooling differ)" in capsys.readouterr().err


def test_a_job_s_files_have_the_same_columns_and_a_wrong_row_is_named_first(alone, tmp_path, monkeypatch, capsys):
    ids = [*range(20), "A1", *range(20)]
    lines = [json.dumps({"text": f"text number {number}", "id": value}) for number, value in enumerate(ids)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, '{"text": "last", "more": 1}', ""]))
    monkeypatch.setattr(rows, "PIECE_BYTES", 500)
    command = ["embed", f"{alone}/checkpoints/best", "--input", str(tmp_path / "in.jsonl"), "--output"]
    assert run_app([*command, str(tmp_path / "out")]) == 0
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    assert len({str(pq.read_schema(part)) for part in parts}) == 1 < len(parts)
    table = pq.read_table(tmp_path / "out")
    assert [value and json.loads(value) for value in table["id"].to_pylist()] == [*ids, None]
    assert table["more"].to_pylist() == [None] * len(ids) + [1]
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    assert run_app([*command, str(tmp_path / "other")]) == 2
    assert "Line 43 of" in (said := " ".join(capsys.readouterr().err.split()))
    assert "column text contains a number (7) instead of text" in said
    assert not (tmp_path / "other").exists(), "with the row mended, the same command is another job"


def load_best(run):
    return load(f"{run}/checkpoints/best")


def test_a_run_goes_on_from_an_exported_and_imported_model(alone, folder, shards, tmp_path, capsys):
    assert run_app(["export", f"{alone}/checkpoints/best", str(tmp_path / "theirs")]) == 0
    assert run_app(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    run = check(
        settings(
            folder,
            shards,
            "further",
            model={"start_from": str(tmp_path / "ours")},
            # Nothing is clipped, so that the optimizer sees gradients as they arrived.
            train={"steps": 10, "workers": 2, "gradient_exchange": "bfloat16", "grad_clip": 1e9},
            schedule={"warmup_steps": 0, "decay": "wsd", "decay_fraction": 0.4},
            every={"checkpoint": 1},
            checkpoint={"keep_last": 10},
        )
    )
    train(run)
    rates = [record["lr"] for record in read_metrics(run.uri) if "loss" in record]
    assert rates == pytest.approx([run.config.optimizer.lr * part for part in (*[1] * 7, 0.75, 0.5, 0.25)])
    optimizer = load_state(Path(f"{run.uri}/checkpoints/step-00000001"))["optimizer"]
    for moments in optimizer["state"].values():
        gradient = moments["exp_avg"] / (1 - run.config.optimizer.beta1)
        assert torch.allclose(gradient, gradient.bfloat16().float(), rtol=1e-5, atol=0), "sent in another type"
    first = next(record for record in read_metrics(run.uri) if "validation" in record)
    step = storage.read_json(f"{alone}/probes/best.json")["step"]
    (before,) = [record["validation"]["loss"] for record in read_metrics(alone) if record["step"] == step]
    assert first["step"] == 0
    assert first["validation"]["loss"] == pytest.approx(before, rel=1e-5)
    path = tmp_path / "c.yaml"
    path.write_text(run.config.to_yaml())
    assert run_app(["pretrain", str(path), "run.name=wider", "model.hidden_size=32"]) == 2
    said = capsys.readouterr().err
    assert "has hidden_size=16, but this run asks for 32" in said
    assert "a run takes the dimensions of the model it starts from" in said


def test_a_run_starts_from_token_vectors_and_averaging_attention_and_others_find_the_vectors(
    folder, tmp_path_factory, capsys
):
    shards = make_shards(str(tmp_path_factory.mktemp("text")), rows=3000, unit_rows=512, vocabulary=400)
    inits = {"embedding_init": "whitened", "attention_init": "average", "output_init": "centred", "mlm_init": "unigram"}
    inits["ffn_init"] = "zero"
    every = {"log": 1, "validation": 0, "probe": 0, "checkpoint": 1}
    small = {"model": inits, "train": {"steps": 3}, "schedule": {"warmup_steps": 0}, "every": every}
    path = f"{folder}/spectral.yaml"
    storage.write_bytes(path, settings(folder, shards, "spectral", **small).to_yaml().encode())
    task = make_task(tmp_path_factory.mktemp("task"))
    assert run_app(["pretrain", path, "every.probe=3", f"probe.tasks=[{task}]"]) == 0
    assert "factorising" in capsys.readouterr().err
    client.wait(f"{folder}/spectral", str(folder), timeout=LONGEST)
    start, last = queue.records(f"{folder}/spectral").values()
    assert (start["step"], last["step"]) == (0, 3)
    assert last["baselines"]["start"]["mean"] == start["mean"]
    gain = last["mean"]["test_accuracy"] - start["mean"]["test_accuracy"]
    assert last["beyond_start"]["mean"]["difference"] == pytest.approx(gain)
    (table,) = (uri for uri in storage.list_dir(shards.uri) if "spectral-" in uri)
    made = os.stat(table).st_mtime_ns
    assert spectral_files.shape(table) == (400, 50_257)

    assert run_app(["pretrain", path, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "start whitened token vectors from" in said
    assert (
        "already computed, average attention, feed-forward layers at zero, centred vectors, token frequencies" in said
    )
    assert run_app(["pretrain", path, "run.name=spectral-again", "train.workers=2"]) == 0
    assert "factorising" not in capsys.readouterr().err
    np.testing.assert_allclose(losses(f"{folder}/spectral-again"), losses(f"{folder}/spectral"), rtol=2e-4)
    assert run_app(["pretrain", path, "train.steps=4"]) == 0, "resumed"
    for name, steps in (("spectral", 4), ("spectral-again", 3)):
        norm = load(f"{folder}/{name}/checkpoints/step-{steps:08d}").layers[-1].ffn_norm.weight
        assert torch.equal(norm, torch.full_like(norm, WHITENED_GAIN)), "it is not trained"
    assert os.stat(table).st_mtime_ns == made

    # Made by another number of tasks, and where the shards' place cannot be written, it is the same.
    content = storage.read_bytes(table)
    storage.remove(table)
    os.mkdir(table)
    elsewhere = spectral_table.ensure(shards, Recipe(0), f"{folder}/elsewhere", parts=3)
    assert elsewhere == f"{folder}/elsewhere/{os.path.basename(table)}"
    assert storage.read_bytes(elsewhere) == content
    # Trials share one that lies above their directories.
    trial = settings(f"{folder}/trials", shards, "0", **small)
    shared = spectral_table.for_run(trial, shards, cpus=1, shared=True)
    assert shared == f"{folder}/trials/{os.path.basename(table)}"
    assert spectral_table.for_run(trial, shards, cpus=1) == shared
    assert storage.read_bytes(shared) == content
    # So it is when another seed orders the units, all of which are counted.
    assert Recipe(1).sample(shards) != Recipe(0).sample(shards)
    storage.remove(elsewhere)
    assert spectral_table.ensure(shards, Recipe(1), f"{folder}/elsewhere") == elsewhere
    assert storage.read_bytes(elsewhere) == content

    assert run_app(["pretrain", path, "model.embedding_init=random"]) == 2
    assert "was started with model.embedding_init=whitened and cannot be resumed with random" in capsys.readouterr().err
    few = ["run.name=few", f"data.shards={make_shards(str(tmp_path_factory.mktemp('few'))).uri}"]
    assert run_app(["pretrain", path, *few]) == 2
    assert "set model.embedding_init=random" in capsys.readouterr().err


def test_a_dry_run_measures_and_writes_nothing(folder, shards, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(settings(folder, shards, "dry", train={"workers": 2}).to_yaml())
    assert run_app(["pretrain", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"{STEPS * 12 * 32:,} positions" in said
    for part in ("FLOPs", "memory per worker", "2 micro-batches of 3 per worker", f"{STEPS} steps, from 3 measured"):
        assert part in said, part
    assert not storage.exists(f"{folder}/dry")


def test_two_runs_with_one_seed_have_the_same_losses(alone, folder, shards):
    run = check(settings(folder, shards, "again"))
    train(run)
    assert losses(run.uri).tolist() == losses(alone).tolist()


def test_two_workers_one_of_them_killed_have_the_losses_of_one(alone, folder, shards):
    pair = {"workers": 2, "max_failures": 1}
    run = check(settings(folder, shards, "pair", train=pair))
    steps = train_with_a_kill(run, behind=15)
    np.testing.assert_allclose(losses(run.uri), losses(alone), rtol=2e-4)
    account, undisturbed = read_account(run.uri), read_account(alone)
    assert account.digests.tolist() == undisturbed.digests.tolist()
    assert account.repeated >= len(steps) - STEPS > 0
    assert [attempt.workers for attempt in account.attempts] == [2, 2]
    # A finished run is finished: the same command again does nothing.
    assert train(check(settings(folder, shards, "pair", train=pair))) == {}


def test_two_workers_one_of_them_killed_and_three_have_every_loss_of_one_replica(folder, shards, tmp_path, capsys):
    sections = {
        "objective": {
            "pair": "contrastive",
            "bag_weight": 0.5,
            "bag_tokens": 4,
            "bag_of": "neighbour",
            "mlm_rate": 0.4,
            "mlm_rate_end": 0.15,
            "pair_weight": 0.5,
        },
        "every": {"probe": 0},
    }
    names = ("loss", "mlm_loss", "contrast_loss", "bag_loss", "contrast_accuracy")
    found = {}
    for workers in (2, 3):
        cut = {"steps": 24, "micro_batch": 2, "workers": workers, "max_failures": 1}
        run = check(settings(folder, shards, f"contrast-{workers}", train=cut, **sections))
        if workers == 2:
            train_with_a_kill(run, behind=12)
        else:
            train(run)
        logged = [record for record in read_metrics(run.uri) if "loss" in record]
        found[workers] = np.array([[record[name] for name in names] for record in logged])
        assert "nsp_loss" not in logged[-1]
        assert run_app(["verify", run.uri]) == 0, capsys.readouterr().out
    plain = np.array([[step[name] for name in names] for step in train_plainly(run.config)])
    np.testing.assert_allclose(found[2], plain, rtol=5e-4)
    np.testing.assert_allclose(found[3], plain, rtol=5e-4)
    page = storage.read_bytes(write_report(run.uri)).decode()
    assert "Contrastive loss" in page
    assert "Next-sentence loss" not in page
    assert run_app(["export", f"{run.uri}/checkpoints/step-00000024", str(tmp_path / "theirs")]) == 0
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert "on masked words and contrast and words of the text. Its next-sentence head was not trained." in card
    assert "pair contrastive, mlm_rate 0.4, mlm_rate_end 0.15" in card
    tree = settings(folder, shards, "contrast-3", train=cut, **sections).model_dump(mode="json")
    for section, key, value in (
        ("objective", "vectors", "mean"),
        ("objective", "mlm_rate", 0.3),
        ("train", "steps", 48),
        ("train", "micro_batch", 4),
    ):
        before, changed = tree[section][key], tree[section] | {key: value}
        with pytest.raises(
            InputError, match=rf"was started with {section}\.{key}={before} and cannot be resumed with {value}"
        ):
            check(from_mapping(tree | {section: changed}))


def test_masked_words_alone_leave_the_heads_as_they_began(folder, shards):
    """Two ranks, one killed: no rank waits for a gradient that never comes, and the optimizer's state is restored."""
    objective, cut = {"pair": "none"}, {"steps": 24, "workers": 2, "max_failures": 1}
    run = check(settings(folder, shards, "alone-mlm", train=cut, objective=objective, every={"probe": 0}))
    train_with_a_kill(run, behind=12)
    trained = load(f"{run.uri}/checkpoints/step-00000024").state_dict()
    torch.manual_seed(run.config.train.seed)
    begun = Bert(run.config.model.bert()).state_dict()
    same = {name.partition(".")[0] for name, value in trained.items() if torch.equal(value, begun[name])}
    assert same == {"nsp_head", "pooler"}
    assert {"loss", "mlm_loss"} == {name for name in read_metrics(run.uri)[-1] if name.endswith("loss")}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.step=3"], "Did you mean"),
        (["model.num_attention_heads=3"], "does not divide"),
        (["train.workers=5"], "cannot be divided"),
        (["train.workers=24", "train.global_batch=24", "train.micro_batch=1"], "does not fit this cluster"),
        (["model.max_position_embeddings=16"], "16 positions"),
        (["data.shards=/nowhere"], "/nowhere"),
        (["probe.tasks=[agnews]"], "did you mean ag_news"),
        (["data.seed=9", "run.name=alone"], "data.seed"),
    ],
)
def test_a_wrong_setting_is_a_sentence_and_exit_code_2(alone, folder, shards, tmp_path, capsys, overrides, sentence):
    path = tmp_path / "c.yaml"
    path.write_text(settings(folder, shards, "bad").to_yaml())
    assert run_app(["pretrain", str(path), *overrides]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not storage.exists(f"{folder}/bad")


def test_a_damaged_shard_is_named(folder, tmp_path, capsys):
    damaged = make_shards(str(tmp_path / "shards"))
    name = damaged.units("train")[0].shard
    content = bytearray(storage.read_bytes(f"{damaged.uri}/{name}"))
    content[len(content) // 2] ^= 1
    storage.write_bytes(f"{damaged.uri}/{name}", bytes(content))
    path = tmp_path / "c.yaml"
    path.write_text(settings(folder, damaged, "bad").to_yaml())
    assert run_app(["pretrain", str(path)]) == 2
    assert name in capsys.readouterr().err
