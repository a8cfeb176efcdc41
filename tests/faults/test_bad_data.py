"""Data that are not what they should be: each fault is a sentence that names it, or a counted drop."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raybert import storage
from raybert.data import stream
from raybert.data.block import to_table
from raybert.data.reader import SampleReader
from raybert.data.shards import (
    _footer,
    open_shards,
    read_unit,
    verify_shards,
    write_manifest,
    write_shard,
)
from raybert.data.text import documents as readers
from raybert.data.text.values import MISSING, NOT_JSON, TOO_LARGE, UNDECODABLE, WRONG_TYPE
from raybert.data.text.windows import encode_document
from raybert.data.units import UnitRows
from raybert.errors import InputError
from raybert.tokenizer import NUM_TEXT_TOKENS, Tokenizer
from tests.data import make_shards, random_rows


@pytest.fixture
def shards(tmp_path):
    _footer.cache_clear()
    return make_shards(str(tmp_path / "shards"))


def first(shards):
    return f"{shards.uri}/{shards.shards()[0].name}"


def with_manifest(shards, change):
    path = f"{shards.uri}/manifest.json"
    tree = json.loads(storage.read_bytes(path))
    change(tree)
    storage.write_json(path, tree)
    return open_shards(shards.uri)


def trusting(shards, name):
    """The set with a manifest that vouches for whatever lies under the name now."""
    import hashlib

    content = storage.read_bytes(f"{shards.uri}/{name}")

    def change(tree):
        entry = next(entry for entry in tree["splits"]["train"] if entry["name"] == name)
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    return with_manifest(shards, change)


def damage(path, how):
    content = bytearray(storage.read_bytes(path))
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "zero length":
        content = bytearray()
    else:
        content[len(content) // 3] ^= 0x40
    storage.write_bytes(path, bytes(content))


@pytest.mark.parametrize("how", ["truncated", "zero length", "a byte flipped"])
def test_a_damaged_shard_is_named_before_training(shards, how):
    damage(first(shards), how)
    with pytest.raises(InputError, match="train-00000-of-00002"):
        verify_shards(shards)


@pytest.mark.parametrize("how", ["truncated", "zero length", "a byte flipped"])
def test_a_shard_damaged_after_that_is_named_when_it_is_read(shards, how):
    """Of a flipped byte only the pages' own checksums can tell."""
    damage(first(shards), how)

    def read_all():
        for unit in shards.units():
            read_unit(shards.uri, unit, shards.vocabulary)

    with pytest.raises(InputError, match="train-00000-of-00002"):
        read_all()


def test_no_flipped_bit_goes_unnoticed(shards):
    """Whatever is read from a shard with one bit changed is what was written, or an error."""
    path, unit = first(shards), shards.units()[1]
    content = storage.read_bytes(path)
    whole = read_unit(shards.uri, unit, shards.vocabulary)
    rng, noticed = np.random.default_rng(0), 0
    for _ in range(300):
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        storage.write_bytes(path, bytes(changed))
        _footer.cache_clear()
        try:
            found = read_unit(shards.uri, unit, shards.vocabulary)
        except InputError:
            noticed += 1
        else:
            assert np.array_equal(found.tokens, whole.tokens)
            assert np.array_equal(found.ends, whole.ends)
    assert noticed > 30


def test_a_missing_shard_is_named(shards):
    storage.remove(first(shards))
    with pytest.raises(InputError, match=r"train-00000-of-00002.*missing"):
        verify_shards(shards)


def test_a_shard_that_goes_missing_later_is_named(shards):
    reader = SampleReader(open_shards(shards.uri), seed=0)
    for shard in shards.shards():
        Path(shards.uri, shard.name).unlink()
    with pytest.raises(InputError, match=f"{shards.uri} is missing a shard that its manifest lists: .*train-0"):
        stream._build(reader, np.arange(10), retry_seconds=0.0)


def test_another_set_under_the_same_name_is_refused(shards):
    assert open_shards(shards.uri, shards.manifest_hash) == shards
    with pytest.raises(InputError, match="no longer contains the shards that this run started with"):
        open_shards(shards.uri, "0" * 64)


def test_a_manifest_of_another_run_is_refused(shards, tmp_path):
    other = make_shards(str(tmp_path / "other"), rows=300, unit_rows=32, seq_len=40)
    shutil.copy(f"{other.uri}/manifest.json", f"{shards.uri}/manifest.json")
    with pytest.raises(InputError, match="train-00000-of-00002"):
        verify_shards(open_shards(shards.uri))


def test_another_schema_is_refused_though_the_hash_fits(shards):
    pq.write_table(pa.table({"text": ["a", "b"]}), first(shards))
    with pytest.raises(InputError, match="has the columns"):
        verify_shards(trusting(shards, shards.shards()[0].name))


def test_other_rows_are_refused_though_the_hash_fits(shards):
    rows = random_rows(10, 32, documents=3)
    write_shard(shards.uri, shards.shards()[0].name, rows, 64)
    with pytest.raises(InputError, match="10 rows"):
        verify_shards(trusting(shards, shards.shards()[0].name))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows.tokens.__setitem__(5, NUM_TEXT_TOKENS), "token id 50257"),
        (lambda rows: rows.tokens.__setitem__(5, 65_535), "token id 65535"),
        (lambda rows: rows.ends.__setitem__(1, 0), "sentence ends"),
        (lambda rows: rows.ends.__setitem__(-1, 999), "sentence ends"),
    ],
)
def test_rows_that_mean_nothing_are_refused(tmp_path, change, sentence):
    rows = random_rows(20, 32, documents=3)
    change(rows)
    uri = str(tmp_path / "s")
    shard = write_shard(uri, "train-00000-of-00001.parquet", rows, 64)
    write_manifest(uri, seq_len=32, unit_rows=64, splits={"train": [shard]}, counts={}, settings={}, inputs={})
    with pytest.raises(InputError, match=sentence):
        SampleReader(open_shards(uri), seed=0).build(np.arange(20))


def documents(path, column="text"):
    piece = readers.Piece(str(path), readers.kind_of(str(path))[0], 0, path.stat().st_size, path.stat().st_size)
    return list(readers.documents(piece, column))


def test_a_line_that_is_too_long_is_counted_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1 << 16)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (1 << 20) + b'"}\n{"text": "short"}\n')
    assert documents(path) == [TOO_LARGE, "short"]
    text = tmp_path / "long.txt"
    text.write_bytes(b"x" * (1 << 20))
    assert documents(text) == [TOO_LARGE]


def test_bytes_that_are_no_text_are_counted(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "\xff\xfe"}\n{"text": "good"}\n\x00\x01\n{"text": 3}\n{"other": "x"}\n')
    assert documents(path) == [
        UNDECODABLE,
        "good",
        NOT_JSON,
        WRONG_TYPE,
        MISSING,
    ]


def test_nul_bytes_are_characters_like_others():
    tokenizer = Tokenizer()
    text = "A word\x00 and a\x00\x00 NUL. " * 20
    document = encode_document(text, tokenizer, 64)
    assert document is not None
    assert document.windows
    assert int(document.tokens.max()) < NUM_TEXT_TOKENS
    assert "\x00" in tokenizer.decode(document.tokens.tolist())


def test_a_document_of_one_sentence_makes_samples(tmp_path):
    """There is no place to cut it, so every sample of it is of two documents or of one segment cut by length."""
    tokens = np.arange(20, dtype=np.uint16)
    rows = UnitRows(
        np.tile(tokens, 8), np.arange(9) * 20, np.full(8, 20, np.uint16), np.arange(9), np.arange(8, dtype=np.int64)
    )
    uri = str(tmp_path / "s")
    shard = write_shard(uri, "train-00000-of-00001.parquet", rows, 64)
    write_manifest(uri, seq_len=32, unit_rows=64, splits={"train": [shard]}, counts={}, settings={}, inputs={})
    columns = SampleReader(open_shards(uri), seed=0).build(np.arange(80))
    assert (columns["length"] <= 32).all()
    assert (columns["masked_positions"][:, 0] >= 0).all()
    assert to_table(columns).num_rows == 80


def test_one_word_documents_leave_no_window():
    tokenizer = Tokenizer()
    for word in ("word", "a", "Donaudampfschifffahrtsgesellschaft"):
        document = encode_document(word, tokenizer, 64)
        assert document is not None
        assert document.windows == [] or len(document.tokens) >= 8
