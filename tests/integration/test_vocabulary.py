"""A vocabulary of one's own, from text to an export: ids of four bytes, whole words, probes, a killed worker."""

import json
import random

import pytest

import raybert
from raybert.cli import run_app
from raybert.config import from_mapping
from raybert.data.shards import open_shards
from raybert.model.files import load
from raybert.probe.service import client, queue
from raybert.records import read_metrics
from raybert.tokenizer import load as load_tokenizer
from raybert.train.check import check
from raybert.verify import verify
from tests.killed import train_with_a_kill
from tests.tasks import make_task
from tests.vocabulary import SENTENCES, write_wordpiece
from tests.waiting import LONGEST

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng, words = random.Random(0), [*SENTENCES.split(), "zebras", "hypercalcaemia", "[MASK]"]
    rows = [{"text": " ".join(rng.choices(words, k=60))} for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def settings(folder, shards, steps, **model):
    return from_mapping(
        {
            "run": {"name": "wide", "storage": str(folder)},
            "data": {"shards": shards},
            "model": model,
            "objective": {"pair": "none", "whole_word": True},
            "train": {"steps": steps, "global_batch": 12, "micro_batch": 3, "dtype": "float32", "max_failures": 1},
            "schedule": {"warmup_steps": 1},
            "every": {"log": 1, "validation": 20, "probe": 60, "checkpoint": 20},
            "validation": {"samples": 30},
            "probe": {"tasks": [make_task(folder), "neighbours"]},
        }
    )


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}


def test_a_run_with_wide_ids_survives_a_kill_verifies_is_probed_and_exported(text, tmp_path, capsys):
    shards, vocabulary = str(tmp_path / "shards"), str(write_wordpiece(tmp_path / "vocabulary", fill=66_000))
    prepared = ["prepare", "--input", text, "--output", shards, "--seq-len", "32", "--validation-fraction", "0.1"]
    assert run_app([*prepared, "--tokenizer", vocabulary]) == 0
    found, tokenizer = open_shards(shards), load_tokenizer(vocabulary)
    assert found.vocabulary.dtype == "uint32"
    assert found.tokenizer().hash == tokenizer.hash
    assert run_app([*prepared, "--tokenizer", vocabulary]) == 0
    assert "already prepared" in " ".join(capsys.readouterr().out.split())
    assert run_app(prepared) == 2
    assert "another tokenizer" in " ".join(capsys.readouterr().err.split())

    run = check(settings(tmp_path, shards, 60, **SIZES))
    train_with_a_kill(run, behind=30)
    client.wait(run.uri, str(tmp_path), timeout=LONGEST)
    faults = [finding for finding in verify(run.uri) if finding.fault]
    assert not faults
    assert [record["step"] for record in read_metrics(run.uri) if "loss" in record] == list(range(1, 61))
    checkpoint = f"{run.uri}/checkpoints/step-00000060"
    here = raybert.probe.run(checkpoint, str(tmp_path / "mine.yaml"), device="cpu")
    records = {record["task"]: record for record in queue.records(run.uri).values() if record["step"] == 60}
    assert records["mine"]["mean"]["deviation"] == pytest.approx(here["mean"]["deviation"], rel=1e-4)
    assert 0 < records["neighbours"]["mean"]["mrr_at_10"] <= 1
    model = load(checkpoint)
    assert (model.tokenizer.hash, model.config.vocab_size) == (tokenizer.hash, tokenizer.size)
    assert run_app(["export", checkpoint, str(tmp_path / "out")]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = [tokenizer.roles["cls"], *tokenizer.encode("taxes will fall"), tokenizer.roles["sep"]]
    assert theirs("taxes will fall")["input_ids"] == ids
    assert f"{tokenizer.size:,} tokens" in (tmp_path / "out" / "README.md").read_text()
