"""Raw text to shards: every kind of input, the same bytes again, and what is refused."""

import gzip
import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from ray.data._internal.execution.resource_manager import ResourceManager

from raybert import storage
from raybert.cli import run_app
from raybert.data.shards import open_shards, read_unit, verify_shards
from raybert.data.text.prepare import LIMITS_SECONDS, prepare
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
            rows = read_unit(shards.uri, unit)
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
    (said,) = re.findall(r"left out: .*", capsys.readouterr().out)
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
    assert f"left out: 1 bad (too large), {words:,} too short, 2 files without a document" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_no_input_is_a_sentence(tmp_path, what):
    if what == "empty":
        (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError):
        prepare([str(tmp_path / f"{what}.jsonl")], str(tmp_path / "out"), seq_len=48)


def test_ray_data_still_has_the_interval_that_is_shortened():
    assert ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S > LIMITS_SECONDS
