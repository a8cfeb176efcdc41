"""Raw text to shards: every kind of input, the same bytes again, and what is refused."""

import gzip
import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from raybert import storage
from raybert.cli import run_app
from raybert.data.shards import open_shards, read_unit, verify_shards
from raybert.data.text.prepare import prepare
from raybert.errors import InputError
from raybert.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("ray_cluster")


WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"]


def document(seed):
    rng = np.random.default_rng(seed)
    return " ".join(" ".join(rng.choice(WORDS, rng.integers(4, 12))).capitalize() + "." for _ in range(12))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Four files of 30 documents, one of each kind."""
    folder = tmp_path_factory.mktemp("raw")
    texts = [[document(30 * kind + i) for i in range(30)] for kind in range(4)]
    pq.write_table(pa.table({"text": texts[0], "id": range(30)}), folder / "a.parquet")
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in part).encode() for part in texts[1:3]]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[0]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines[1]))
    (folder / "d.txt").write_text("\n\n\n".join(texts[3]))
    return folder, texts


@pytest.fixture(scope="module")
def shards(inputs, tmp_path_factory):
    folder, _ = inputs
    out = str(tmp_path_factory.mktemp("shards") / "out")
    return prepare([str(folder)], out, seq_len=48, validation_fraction=0.1, unit_rows=32, shard_tokens=4000)


def files(uri):
    return {file.rpartition("/")[2]: storage.read_bytes(file) for file in storage.list_files(uri)}


def test_every_document_of_every_kind_is_in_it(inputs, shards):
    assert open_shards(shards.uri).manifest_hash == shards.manifest_hash
    verify_shards(shards)
    assert len(shards.units("train")) > 2
    read = shards.counts["documents"]["read"]
    assert read >= 91  # a text file may be one document
    decode, seen = Tokenizer().decode, set()
    for split in ("train", "validation"):
        for unit in shards.units(split):
            rows = read_unit(shards.uri, unit, shards.vocabulary)
            assert (np.diff(rows.token_offsets) <= 45).all()
            for start, end in zip(rows.token_offsets[:-1], rows.token_offsets[1:], strict=True):
                seen.add(decode(rows.tokens[start:end].tolist()))
    everything = " ".join(seen)
    for part in inputs[1]:
        for text in part:
            first = text.split(". ")[1]
            assert first in everything


def test_the_same_input_gives_the_same_bytes(inputs, shards, tmp_path):
    again = prepare(
        [str(inputs[0])], str(tmp_path / "out"), seq_len=48, validation_fraction=0.1, unit_rows=32, shard_tokens=4000
    )
    ours, theirs = files(shards.uri), files(again.uri)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(".parquet"):
            assert ours[name] == theirs[name], name


def test_bad_documents_are_counted_by_reason_and_too_many_are_refused(tmp_path, capsys):
    lines = [json.dumps({"text": document(i)}).encode() for i in range(40)]
    lines += [b'{"text": "\xff\xfe"}', b'{"text": ""}', b'{"text": 7}', b"{not json"]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    arguments = ["prepare", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), "--seq-len", "48"]
    assert run_app(arguments) == 2
    assert re.search(r"4 of 44 documents", capsys.readouterr().err)
    assert not storage.exists(str(tmp_path / "out" / "manifest.json"))
    assert run_app([*arguments, "--max-bad-fraction", "0.2"]) == 0
    bad = open_shards(str(tmp_path / "out")).counts["documents"]["bad_dropped"]
    assert sum(bad.values()) == 4
    assert len(bad) >= 3
    (said,) = re.findall(r"dropped: .*", capsys.readouterr().out)
    assert re.findall(r"(\d) bad \((.*?)\)", said) == [(str(n), reason.replace("_", " ")) for reason, n in bad.items()]


def test_what_makes_no_window_is_counted_and_said(tmp_path, capsys):
    """One-word documents, single sentences, a character of value 0, and a line that is far too long."""
    words, line = (100_000, 1 << 30) if "RAYBERT_SLOW" in os.environ else (5000, 80 << 20)
    texts = [f"word{i}" for i in range(words)] + ["Only one sentence is in this one, number 7, and no more."]
    texts += [f"The {i} bytes of it hold a \0 in the middle. It goes on. {document(i)}" for i in range(30)]
    lines = [json.dumps({"text": text}) for text in texts] + [json.dumps({"text": "word after word " * (line // 16)})]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "in" / "empty.jsonl").write_bytes(b"")
    (tmp_path / "in" / "blank.jsonl.gz").write_bytes(gzip.compress(b"\n\n"))
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--seq-len", "48"]
    assert run_app(["prepare", *arguments]) == 0
    found = open_shards(str(tmp_path / "out")).counts["documents"]
    assert (found["read"], found["too_short_dropped"], found["bad_dropped"]) == (words + 32, words, {"too_large": 1})
    assert found["train"] + found["validation"] == 31
    assert f"dropped: 1 bad (too large), {words:,} too short, 2 files without a document" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_no_input_is_a_sentence(tmp_path, what):
    if what == "empty":
        (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError):
        prepare([str(tmp_path / f"{what}.jsonl")], str(tmp_path / "out"), seq_len=48)


def test_what_lies_beside_the_texts_is_passed_over_and_named(inputs, shards, tmp_path, capsys):
    """The same shards as of the texts alone, also when the first set lies among them."""
    folder = tmp_path / "in"
    shutil.copytree(inputs[0], folder)
    for name in (
        ".ipynb_checkpoints/d-checkpoint.txt",
        "_temporary/0/e.jsonl",
        "notes.md",
        "f.csv",
        "dataset_info.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "What stands here is not read. It is not part of the input."}\n[')
    (folder / "dataset_info.json").write_text("[1, 2]")
    made = ["--seq-len", "48", "--validation-fraction", "0.1"]
    for name in ("first", "second"):
        assert run_app(["prepare", "--input", str(folder), "--output", str(folder / name), *made]) == 0
        out = capsys.readouterr().out
        assert "2 hidden (.ipynb_checkpoints/d-checkpoint.txt, _temporary/0/e.jsonl)" in out
        assert "2 of other kinds (f.csv, notes.md)" in out
        assert ".json without one text per line (dataset_info.json" in out
    assert "2 shards of raybert (first/train-00000-of-00001.parquet, first/validation-00000-of-00001.parquet)" in out
    first, second = open_shards(str(folder / "first")), open_shards(str(folder / "second"))
    assert first.manifest_hash == second.manifest_hash
    assert first.inputs == shards.inputs
    assert first.settings.keys() == {"text_column", "validation_fraction", "shard_tokens"}


def test_an_output_that_would_replace_its_input_is_refused(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"text": [document(i) for i in range(30)]}), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"contains the input file train-00000-of-00001\.parquet and would replace it"):
        prepare([str(tmp_path)], str(tmp_path), seq_len=48)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_without_any_text_is_named_beside_good_ones(tmp_path, kind):
    texts = [document(i) for i in range(300)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, None]))
    if kind == "parquet":
        pq.write_table(
            pa.table({"text": pa.array([None] * 3, pa.string())}), tmp_path / "bad.parquet", row_group_size=2
        )
    else:
        (tmp_path / "bad.jsonl").write_text('{"text": null}\n{"other": 1}\n\n{}\n')
    with pytest.raises(
        InputError, match=rf"bad\.{kind} contains no text: text is missing or null in all of its 3 documents"
    ):
        prepare([str(tmp_path)], str(tmp_path / "out"), seq_len=48, max_bad_fraction=0.5)
    assert not storage.list_files(str(tmp_path / "out"))


def test_a_large_text_file_is_one_document_until_it_is_split(tmp_path, capsys):
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(65 << 20)
    arguments = ["prepare", "--output", str(tmp_path / "out"), "--seq-len", "48", "--input"]
    for allowed in ("0.01", "1"):
        assert run_app([*arguments, str(large), "--max-bad-fraction", allowed]) == 2
        said = capsys.readouterr().err
        assert f"A .txt file, such as {large}, is read as one document of at most 64 MB; split it" in said
        assert "--split-txt blank-lines or --split-txt lines" in said
        assert "allow more with" not in said
        assert "dd documents" not in said
    texts = [document(i) for i in range(30)]
    (tmp_path / "a.txt").write_text("\n\n".join(text.replace(". ", ".\n") for text in texts))
    for split, documents in (("blank-lines", 30), ("lines", 360)):
        done = [*arguments, str(tmp_path / "a.txt"), "--split-txt", split, "--overwrite"]
        assert run_app(done) == 0
        found = open_shards(str(tmp_path / "out"))
        assert found.counts["documents"]["read"] == documents
        assert found.settings["split_txt"] == split
    capsys.readouterr()
    assert run_app([*arguments, str(tmp_path / "a.txt")]) == 2
    assert "contains a shard set made with other settings" in capsys.readouterr().err
    assert run_app([*arguments, str(tmp_path / "a.txt"), "--split-txt", "words"]) == 2
    assert "--split-txt must be one of blank-lines, lines, not words" in capsys.readouterr().err


def test_paths_of_every_spelling_reach_the_same_place(inputs, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs[0], tmp_path / "my texts [1]")
    for number, (source, output) in enumerate(
        [("~/my texts [1]", "~/o:1"), (f"file:{tmp_path}/my%20texts%20%5B1%5D", f"file://localhost{tmp_path}/o%3A2")], 1
    ):
        assert run_app(["prepare", "--input", source, "--output", output, "--seq-len", "48"]) == 0
        assert open_shards(str(tmp_path / f"o:{number}")).inputs == shards.inputs
    for output in ("gs:/bucket/shards", "s4://bucket/shards", "file:shards"):
        assert run_app(["prepare", "--input", "my texts [1]", "--output", output, "--seq-len", "48"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {output}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my texts [1]", "o:1", "o:2"]


def test_test_texts_of_a_probe_are_left_out(tmp_path, capsys):
    texts = [document(seed) for seed in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, part in (("train", texts[:10]), ("test", texts[10:16])):
        rows = [{"text": f"  {text.replace(' ', '  ')}\n", "label": number % 2} for number, text in enumerate(part)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "mine", "train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    command = ["prepare", "--input", str(tmp_path / "in.jsonl"), "--seq-len", "48", "--validation-fraction", "0"]
    assert run_app([*command, "--output", str(tmp_path / "all")]) == 0
    command += ["--hold-out", str(tmp_path / "task.yaml"), "--output", str(tmp_path / "out")]
    assert run_app(command) == 0
    assert "dropped: 6 held out for probes" in " ".join(capsys.readouterr().out.split())
    whole, left = open_shards(str(tmp_path / "all")), open_shards(str(tmp_path / "out"))
    assert (whole.counts["documents"]["train"], left.counts["documents"]["train"]) == (30, 24)
    assert left.counts["documents"]["held_out"] == left.settings["held_out"]["texts"] == 6
    assert "held_out" not in whole.settings
    assert run_app(command) == 0
    assert "already prepared" in " ".join(capsys.readouterr().out.split())
    one = "".join(json.dumps({"text": texts[i], "label": label}) + "\n" for i, label in ((20, 0), (21, 1)))
    (tmp_path / "test.jsonl").write_text(one)
    assert run_app(command) == 2
    assert "other settings" in capsys.readouterr().err
