"""Texts to vectors: as a method of the model, and from files of every kind into one file."""

import gzip
import io
import json
import sys
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import raybert
from raybert.cli import run_app
from raybert.data.text import rows
from raybert.encode import job
from raybert.errors import InputError

TEXTS = ["one text", "", "a longer text, with a comma and a 'quote'", "ünï"] * 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = raybert.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=12)
    return raybert.Bert(config).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("embed") / "checkpoint")
    raybert.save(model, uri)
    return uri


def expected(model, text, pooling):
    """One text alone, without any padding."""
    ids = torch.tensor([[50257, *raybert.Tokenizer().encode(text)[:10], 50258]])
    with torch.inference_mode():
        hidden, pooled = model.encode(ids)
    return {"mean": hidden[0].mean(0), "cls": hidden[0, 0], "pooler": pooled[0]}[pooling].numpy()


@settings(max_examples=15)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=8),
    pooling=st.sampled_from(["mean", "cls", "pooler"]),
    batch_tokens=st.sampled_from([None, 1, 24]),
)
def test_the_vectors_are_those_of_each_text_alone(model, texts, pooling, batch_tokens):
    found = model.embed(texts, pooling=pooling, batch_tokens=batch_tokens)
    assert found.shape == (len(texts), 16)
    assert found.dtype == np.float32
    for vector, text in zip(found, texts, strict=True):
        np.testing.assert_allclose(vector, expected(model, text, pooling), rtol=1e-4, atol=1e-5)


def test_a_model_in_training_stays_in_training(model):
    twin = raybert.Bert(model.config).train()
    twin.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(twin.embed(["one text"]), model.embed(["one text"]))  # no dropout
    assert twin.training
    assert not model.training


def test_what_will_not_do_is_said(model):
    with pytest.raises(InputError, match="no pooling 'max'; use one of pooler, cls, mean"):
        model.embed(["a"], pooling="max")
    with pytest.raises(TypeError, match="list of texts"):
        model.embed("a")
    other = raybert.Bert(raybert.BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(InputError, match="vocabulary of 100"):
        other.embed(["a"])


def write_inputs(folder):
    """The texts in every kind of file; those but the text files have a second column."""
    table = pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    pq.write_table(table, folder / "t.parquet", row_group_size=5)
    pyarrow.csv.write_csv(table, folder / "t.csv")
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
    (folder / "t.jsonl").write_text(lines)
    (folder / "t.txt").write_text("\n".join(TEXTS) + "\n")
    with gzip.open(folder / "t.txt.gz", "wt") as file:
        file.write("\n".join(TEXTS))  # the last line without its end
    return ["t.parquet", "t.csv", "t.jsonl", "t.txt", "t.txt.gz"]


def test_every_kind_of_file_gives_the_same_vectors(model, checkpoint, tmp_path):
    vectors = model.embed(TEXTS)
    for name in write_inputs(tmp_path):
        output = tmp_path / f"{name}.out.parquet"
        arguments = ["embed", checkpoint, "--input", str(tmp_path / name), "--output", str(output)]
        assert run_app(arguments) == 0, name
        table = pq.read_table(output)
        assert table["text"].to_pylist() == TEXTS, name
        np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), vectors, atol=1e-6)
        if "txt" not in name:
            kind = str if "csv" in name else int  # csv has no types: every value is the text that stands there
            assert table["id"].to_pylist() == list(map(kind, range(len(TEXTS))))
        assert run_app(arguments) == 2, "what lay there was written over"


def test_standard_input_becomes_an_array(model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))
    output = tmp_path / "out.npy"
    assert run_app(["embed", checkpoint, "--input", "-", "--output", str(output), "--pooling", "cls"]) == 0
    np.testing.assert_allclose(np.load(output), model.embed(TEXTS, pooling="cls"), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input", "{}/t.jsonl", "--text-column", "body", "--output", "{}/o.npy"], "no column body; choose one of"),
        (["--input", "{}/t.csv", "--text-column", "body", "--output", "{}/o.npy"], "no column body; choose one of"),
        (["--input", "{}/t.*", "--output", "{}/o.npy"], "files of several kinds"),
        (["--input", "{}/none", "--output", "{}/o.npy"], "does not exist"),
        (["--input", "{}/t.txt", "--output", "{}/o.npy", "--pooling", "max"], "There is no pooling 'max'"),
        (["--input", "-", "--output", "{}/directory"], "need an --output that ends in .npy or .parquet"),
    ],
)
def test_wrong_input_is_a_sentence(checkpoint, tmp_path, capsys, arguments, sentence):
    write_inputs(tmp_path)
    assert run_app(["embed", checkpoint, *(argument.format(tmp_path) for argument in arguments)]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "o.npy").exists()


def test_pieces_cover_a_file_of_lines_once(tmp_path, monkeypatch):
    texts = [f"line {number} " * (number % 7) for number in range(300)]
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n")
    monkeypatch.setattr(rows, "PIECE_BYTES", 997)
    source = rows.plan(str(tmp_path / "t.txt"), "anything")
    assert len(source.pieces) > 5
    found = [t for piece in source.pieces for table in rows.read(piece, "text") for t in table["text"].to_pylist()]
    assert found == texts


@pytest.mark.parametrize("later", [{"text": ["c"], "id": ["x"]}, {"text": ["c"], "id": [3], "more": [1]}])
def test_columns_that_change_from_file_to_file_are_a_sentence(checkpoint, tmp_path, capsys, later):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"], "id": [1, 2]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table(later), tmp_path / "in" / "b.parquet")
    command = ["embed", checkpoint, "--input", str(tmp_path / "in"), "--output"]
    assert run_app([*command, str(tmp_path / "o.parquet")]) == 2
    said = capsys.readouterr().err
    assert "The rows after the first 2 have other columns" in said
    assert "b.parquet" in said
    assert not (tmp_path / "o.parquet").exists()
    assert run_app([*command, str(tmp_path / "o.npy")]) == 0


@pytest.mark.parametrize("batch_rows", [1, 2, 1024])
@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([1, 2, "A1"], ["1", "2", '"A1"']),
        ([1, 10**29], ["1", str(10**29)]),
        ([1, 2**64 - 1], [1, 2**64 - 1]),
        ([-1, 2**64 - 1], ["-1", str(2**64 - 1)]),
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([{}, {"a": "ü"}], [{"a": None}, {"a": "ü"}]),
        ([{}, {}], ["{}", "{}"]),
        ([[1], ["x"]], ["[1]", '["x"]']),
        ([True, 1], ["true", "1"]),
        ([None, None], [None, None]),
    ],
)
def test_values_of_several_types_are_kept(checkpoint, tmp_path, monkeypatch, values, kept, batch_rows):
    """In which rows they stand, and in which file, changes nothing."""
    (tmp_path / "in").mkdir()
    for number, value in enumerate(values):
        line = json.dumps({"text": f"text {number}", "id": value}) + "\n"
        with (tmp_path / "in" / f"{number // 2}.jsonl").open("a") as file:
            file.write(line)
    (tmp_path / "in" / "last.jsonl").write_text('{"text": null}\n')
    monkeypatch.setattr(rows, "BATCH_ROWS", batch_rows)
    output = tmp_path / "o.parquet"
    assert run_app(["embed", checkpoint, "--input", str(tmp_path / "in"), "--output", str(output)]) == 0
    found = pq.read_table(output)
    assert found["id"].to_pylist() == [*kept, None]
    assert found["text"].to_pylist() == [*(f"text {number}" for number in range(len(values))), None]
    assert run_app(["embed", checkpoint, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "o.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), np.stack(found["embedding"].to_numpy()), atol=1e-6)


@pytest.mark.parametrize("other", ["\\ud83d", "x", "a\\udc00b"])
def test_a_broken_text_in_another_column_is_refused_where_it_would_be_written(checkpoint, tmp_path, capsys, other):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "o": ["' + other + '"]}\n')
    command = ["embed", checkpoint, "--input", str(tmp_path / "t.jsonl"), "--output"]
    assert run_app([*command, str(tmp_path / "o.npy")]) == 0
    assert run_app([*command, str(tmp_path / "o.parquet")]) == (0 if other == "x" else 2)
    if other != "x":
        assert "Line 3 of" in (said := capsys.readouterr().err)
        assert "a lone surrogate" in said


def test_another_text_is_another_input(tmp_path):
    for name, text in (("t.csv", "text\n{}\n"), ("t.jsonl", '{{"text": "{}"}}\n')):
        path = tmp_path / name
        found = []
        for word in ("ants", "bees", "ants"):
            path.write_text(text.format(word))
            found.append(rows.plan(str(path), "text").identity)
        assert found[0] == found[2] != found[1], name


def test_a_table_has_the_columns_of_all_its_rows(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b", "id": 7}\n')
    source = rows.plan(str(tmp_path / "t.jsonl"), "text")
    (table,) = [table for piece in source.pieces for table in rows.read(piece, "text")]
    assert table.to_pylist() == [{"text": "a", "id": None}, {"text": "b", "id": 7}]


@pytest.mark.parametrize("content", [b"", b'{"weights": "ab', b"[]", b"\0" * 99, b"\xff", b'{"pieces": NaN}'])
def test_vectors_whose_description_is_damaged_are_not_mixed_with_others(checkpoint, tmp_path, monkeypatch, content):
    (tmp_path / "in.txt").write_text("a text\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / job.PLAN).write_bytes(content)

    def embed():
        job.embed_job(job.Settings(checkpoint, "text"), str(tmp_path / "in.txt"), str(tmp_path / "out"))

    monkeypatch.setattr(job, "largest_resources", Mock(side_effect=RuntimeError("the cluster is next")))
    with pytest.raises(RuntimeError, match="the cluster is next"):  # no vectors yet: the output will do
        embed()
    (tmp_path / "out" / "part-00000.parquet").touch()
    with pytest.raises(
        InputError, match=rf"{job.PLAN} is damaged \(.*\), so it is unknown how .* were made; delete {tmp_path}/out, or"
    ):
        embed()
    assert (tmp_path / "out" / job.PLAN).read_bytes() == content
    (tmp_path / "out" / job.PLAN).unlink()
    with pytest.raises(InputError, match="already exists; give another --output"):
        embed()


def test_bytes_are_text_and_an_earlier_embedding_is_replaced(checkpoint, model, tmp_path, capsys):
    texts = ["one text", "ünï"]
    old = pa.array([[1.0], [2.0]])
    pq.write_table(pa.table({"text": [t.encode() for t in texts], "embedding": old}), tmp_path / "in.parquet")
    arguments = ["embed", checkpoint, "--input", str(tmp_path / "in.parquet"), "--output"]
    assert run_app([*arguments, str(tmp_path / "out.parquet")]) == 0
    found = np.stack(pq.read_table(tmp_path / "out.parquet")["embedding"].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(found, model.embed(texts), rtol=1e-5, atol=1e-5)
    pq.write_table(pa.table({"text": [b"\xff\xfe"]}), tmp_path / "in.parquet")
    assert run_app([*arguments, str(tmp_path / "no.parquet")]) == 2
    assert "is not UTF-8" in capsys.readouterr().err
