"""Spans of a shard set: drawn over the whole split, with little read, in any vocabulary and script."""

import json

import numpy as np
import pytest

from raybert.data.shards import UnitRows, open_shards, shard_name, write_manifest, write_shard
from raybert.encode.encoders import RaybertEncoder
from raybert.errors import InputError
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.probe import kinds, neighbours
from raybert.probe.baselines import Cache
from raybert.probe.evaluate import evaluate, prepare
from raybert.probe.tasks import load_task
from raybert.tokenizer import Tokenizer
from tests.data import make_shards
from tests.vocabulary import make_set, wordpiece

NEIGHBOURS = kinds.KINDS["neighbours"]


def task_of(uri, **settings):
    return load_task(f"neighbours@{uri}").model_copy(update=settings)


def write_texts(folder, texts, tokenizer=None, unit_rows=16):
    """A shard set whose validation windows are these texts, of one sentence each."""
    tokenizer = tokenizer or Tokenizer()
    ids = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(each) for each in ids])
    rows = UnitRows(
        tokens=np.concatenate(ids).astype(tokenizer.vocabulary.dtype),
        token_offsets=np.append(0, np.cumsum(lengths)).astype(np.int64),
        ends=lengths.astype(np.uint16),
        end_offsets=np.arange(len(ids) + 1),
        doc=np.arange(len(ids)),
    )
    shard = write_shard(str(folder), shard_name("validation", 0, 1), rows, unit_rows)
    about = {"counts": {}, "settings": {}, "inputs": {}, "tokenizer": tokenizer}
    write_manifest(str(folder), seq_len=128, unit_rows=unit_rows, splits={"validation": [shard]}, **about)
    return str(folder)


def numbered(count):
    return [
        f"This is the window number {i}, which is long enough, and here it ends: number {i} it was."
        for i in range(count)
    ]


def test_spans_are_drawn_over_the_whole_split_and_little_of_it_is_read(tmp_path, monkeypatch):
    uri = write_texts(tmp_path, numbered(1600))  # 100 units of 16
    read: list[int] = []
    read_unit = neighbours.read_unit

    def counted(uri, unit, vocabulary):
        read.append(unit.row_group)
        return read_unit(uri, unit, vocabulary)

    monkeypatch.setattr(neighbours, "read_unit", counted)
    monkeypatch.setattr(neighbours, "UNITS", 10)
    task = task_of(uri, n_test=40)
    data = NEIGHBOURS.read(task)
    assert data.relevance.queries == data.relevance.documents == 40
    assert len(read) == 10
    assert max(read) > 60
    assert min(read) < 40
    places = [int(text.split("number ")[1].split(",")[0].split()[0]) for text in data.queries]
    assert len({place // 16 for place in places}) > 5
    assert NEIGHBOURS.read(task).hash == data.hash
    assert NEIGHBOURS.read(task.model_copy(update={"seed": 1})).hash != data.hash
    read.clear()
    NEIGHBOURS.read(task.model_copy(update={"n_test": 800}))
    assert len(read) == 100  # twice the spans


def test_every_window_is_as_likely(tmp_path):
    task = task_of(write_texts(tmp_path, numbered(60)), n_test=20)
    drawn = np.zeros(60)
    for seed in range(150):
        for text in NEIGHBOURS.read(task.model_copy(update={"seed": seed})).queries:
            drawn[int(text.split("number ")[1].split(",")[0].split()[0])] += 1
    assert drawn.sum() == 150 * 20
    assert drawn.min() > 25  # 50 expected, with a deviation of 5.8
    assert drawn.max() < 80


def test_windows_that_are_no_span_are_counted(tmp_path):
    texts = [*numbered(30), *["Too short."] * 7, *[" \n" * 40] * 3]
    task = task_of(write_texts(tmp_path, texts))
    data = NEIGHBOURS.read(task)
    assert NEIGHBOURS.about(data) == {"n_test": 30, "n_documents": 30, "dropped": 10}


def test_before_a_run_the_manifest_alone_of_a_large_set_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "read_unit", lambda *_: pytest.fail("a unit was read"))
    shards = make_shards(str(tmp_path / "shards"), validation=neighbours.FEW_WINDOWS + 1)
    assert task_of(shards.uri).shards == shards.uri
    short = write_texts(tmp_path / "short", ["Short."] * 100)
    with pytest.raises(InputError, match=r"needs 20 validation windows of 16 tokens or more, but .* has 1\d;"):
        load_task(f"neighbours@{short}")


def judged(uri, tmp_path):
    shards = open_shards(uri)
    tokenizer = shards.tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = Bert(config).eval()
    model.tokenizer = tokenizer
    encoder = RaybertEncoder(model)
    material = prepare(task_of(uri), encoder.tokenize, 64)
    found = evaluate(encoder, material, Cache(str(tmp_path / "cache")))
    json.dumps(found, allow_nan=False)
    assert 0 <= found["mean"]["mrr_at_10"] <= 1
    assert 0 <= found["baselines"]["untrained"]["mean"]["mrr_at_10"] <= 1
    return material.data, found


def test_shards_of_another_vocabulary(tmp_path):
    make_set(tmp_path / "shards", wordpiece(tmp_path / "words"))
    data, found = judged(str(tmp_path / "shards"), tmp_path)
    assert set("".join(data.texts)) <= set("abcdefghijklmnopqrstuvwxyz .,!#")
    assert found["baselines"]["bm25"]["mrr_at_10"] > 0


@pytest.mark.parametrize(
    "script",
    [
        "今天天气很好，我们去公园散步。然后回家吃晚饭",
        "Сегодня хорошая погода и мы идём гулять в парк",
        "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
        "🎈👩‍👩‍👧🌦🚀" * 4,
    ],
)
def test_shards_of_another_script(tmp_path, script):
    """Of a vocabulary of bytes: a cut may go through a character, of which then neither side has a part."""
    texts = [f"{i}{''.join(np.roll(list(script), i))}{i}{script[: i % 7]}" for i in range(100, 125)]
    data, found = judged(write_texts(tmp_path / "shards", texts), tmp_path)
    assert data.relevance.queries >= 20
    assert not any("\ufffd" in text for text in data.texts)
    for query, document in zip(data.queries, data.documents, strict=False):
        assert any(text.startswith(query) for text in texts)
        assert any(text.endswith(document) for text in texts)
    assert set(found["baselines"]) == {"bm25", "tfidf", "untrained"}
