"""The ledger: digests that anyone can compute, files that survive, and an account that notices every gap."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert import storage
from raybert.data.block import take
from raybert.data.reader import SampleReader
from raybert.errors import InputError
from raybert.storage import growing
from raybert.train import ledger
from tests.data import make_shards
from tests.faults.driver import BATCH, SEED, recomputed_digests


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")), seq_len=64, rows=200)


@pytest.fixture(scope="module")
def samples(shards):
    return SampleReader(shards, seed=SEED).build(np.arange(3 * BATCH))


def test_another_reader_computes_the_same(shards, samples):
    parts = [take(samples, slice(step * BATCH, (step + 1) * BATCH)) for step in range(3)]
    assert [ledger.digest(part) for part in parts] == recomputed_digests(shards.uri, 3)


@given(st.permutations(range(BATCH)), st.integers(1, BATCH - 1))
def test_neither_order_nor_division_matters(samples, order, cut):
    whole = ledger.digest(take(samples, slice(0, BATCH)))
    parts = [take(samples, np.array(order[:cut])), take(samples, np.array(order[cut:]))]
    assert sum(map(ledger.digest, parts)) % 2**64 == whole


@pytest.mark.parametrize("name", ["index", "input_ids", "masked_positions", "masked_labels", "next_sentence_label"])
def test_every_part_of_a_sample_counts(samples, name):
    changed = {key: values.copy() for key, values in samples.items()}
    changed[name].reshape(-1)[3] ^= 1
    assert ledger.digest(changed) != ledger.digest(samples)


def write(run, restored, first, values, workers=2, skipped=()):
    writer = ledger.Ledger(str(run), restored=restored, workers=workers)
    writer.add(first, values, [step in skipped for step in range(first, first + len(values))])
    writer.flush()


VALUES = [int(value) for value in np.random.default_rng(0).integers(0, 2**63, 100)]


def test_restarts_are_one_course(tmp_path):
    write(tmp_path, 0, 1, VALUES[:30], skipped={4, 25})
    write(tmp_path, 20, 21, VALUES[20:50], workers=1)
    write(tmp_path, 50, 51, VALUES[50:])
    account = ledger.read_account(str(tmp_path))
    assert account.digests.tolist() == VALUES
    assert [(a.restored, a.last, a.workers) for a in account.attempts] == [(0, 30, 2), (20, 50, 1), (50, 100, 2)]
    assert account.repeated == 10
    assert account.skipped == 1, "step 25 was done again, and its update was made"


def test_a_gap_is_noticed(tmp_path):
    write(tmp_path, 0, 1, VALUES[:30])
    write(tmp_path, 40, 41, VALUES[40:50])
    with pytest.raises(InputError, match="31 to 40"):
        ledger.read_account(str(tmp_path))


def test_a_step_out_of_order_is_noticed(tmp_path):
    write(tmp_path, 0, 1, VALUES[:30])
    write(tmp_path, 20, 22, VALUES[21:50])
    with pytest.raises(InputError, match="step 22 where step 21"):
        ledger.read_account(str(tmp_path))


def test_other_samples_the_second_time_are_noticed(tmp_path):
    write(tmp_path, 0, 1, VALUES[:30])
    write(tmp_path, 20, 21, [*VALUES[20:24], 7])
    with pytest.raises(InputError, match=r"Step 25 .* after a restart"):
        ledger.read_account(str(tmp_path))


def test_half_a_line_at_the_end_is_passed_over_and_a_damaged_one_is_named(tmp_path):
    write(tmp_path, 0, 1, VALUES[:30])
    (path,) = (tmp_path / "ledger").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert len(ledger.read_account(str(tmp_path)).digests) == 29
    lines = content.splitlines(keepends=True)
    lines[5] = b'{"step": 5, "dig\n'
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match="damaged line"):
        ledger.read_account(str(tmp_path))
    head = lines[0]
    for damaged in (
        b"[]\n",
        b"{}\n",
        b'{"attempt": 1, "restored": "0", "workers": 1}\n',
        head + b"[]\n",
        head + b"7\n",
        head + b"{}\n",
        head + b'{"step": "1", "digest": "0000000000000001"}\n',
        head + b'{"step": 1, "digest": "-000000000000001"}\n',
        head + b'{"step": 1, "digest": "10000000000000000"}\n',
        head + b'{"step": 1, "digest": 5}\n',
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged line"):
            ledger.read_account(str(tmp_path))


def test_files_stay_small_and_an_object_store_gets_whole_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "FILE_STEPS", 25)
    for run in (str(tmp_path), "memory://ledger-test"):
        writer = ledger.Ledger(run, restored=0, workers=1)
        for first in range(1, 101, 10):
            writer.add(first, VALUES[first - 1 : first + 9], [False] * 10)
        writer.flush()
        names = [uri.rpartition("/")[2] for uri in storage.list_dir(storage.join(run, "ledger"))]
        assert names == [f"00001-{first:010d}.jsonl" for first in (1, 31, 61, 91)]
        assert ledger.read_account(run).digests.tolist() == VALUES


def test_a_step_waits_for_no_upload(monkeypatch):
    begun, may_end, whole = threading.Event(), threading.Event(), storage.write_bytes

    def slow(uri, content):
        begun.set()
        assert may_end.wait(60)
        whole(uri, content)

    monkeypatch.setattr(growing, "UPLOAD_SECONDS", 0.0)
    monkeypatch.setattr(storage, "write_bytes", slow)
    writer = ledger.Ledger("memory://ledger-slow", restored=0, workers=1)
    for first in range(1, 101, 10):
        writer.add(first, VALUES[first - 1 : first + 9], [False] * 10)
        assert begun.wait(60)
    may_end.set()
    writer.flush()
    assert ledger.read_account("memory://ledger-slow").digests.tolist() == VALUES


def test_a_write_that_fails_half_way_leaves_nothing_and_can_be_done_again(tmp_path, monkeypatch):
    writer = ledger.Ledger(str(tmp_path), restored=0, workers=1)
    writer.add(1, VALUES[:5], [False] * 5)
    real = open

    class Full:
        """A disk with room for ten more bytes."""

        def __init__(self, *arguments, **options):
            self.file = real(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            if len(content) > 10 and self.file.write(content[:10]):
                raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", Full)
        with pytest.raises(OSError, match="No space"):
            writer.add(6, VALUES[5:9], [False] * 4)
    writer.add(6, VALUES[5:9], [False] * 4)
    assert ledger.read_account(str(tmp_path)).digests.tolist() == VALUES[:9]


def test_lines_are_json(tmp_path):
    write(tmp_path, 0, 1, VALUES[:2], skipped={2})
    (path,) = (tmp_path / "ledger").iterdir()
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert header == {"attempt": 1, "restored": 0, "workers": 2}
    assert lines == [
        {"step": 1, "digest": f"{VALUES[0]:016x}"},
        {"step": 2, "digest": f"{VALUES[1]:016x}", "skipped": True},
    ]
