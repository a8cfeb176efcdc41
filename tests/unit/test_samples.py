"""The laws of plan, pairs and masks."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.data import masking
from raybert.data.block import build, empty
from raybert.data.masking import max_masked
from raybert.data.plan import Plan
from raybert.data.reader import SampleReader, iter_batches
from raybert.data.rng import fold
from raybert.data.spec import MASKED_FRACTION, ORIGINAL
from raybert.tokenizer import CLS_ID, MASK_ID, NUM_TEXT_TOKENS, PAD_ID, SEP_ID
from tests.data import make_shards, random_rows

UNITS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=50)
@given(units=UNITS, seed=st.integers(0, 100), start=st.integers(0, 10**12))
def test_an_epoch_holds_every_row_once_and_seeking_changes_nothing(units, seed, start):
    plan = Plan(units, seed)
    first = start - start % plan.rows
    epochs, unit, row = plan.locate(np.arange(first, first + plan.rows))
    assert set(epochs) == {first // plan.rows}
    assert len(set(zip(unit.tolist(), row.tolist(), strict=True))) == plan.rows
    assert (row < np.asarray(units)[unit]).all()
    again = Plan(units, seed).locate(np.array([start]))
    place = start - first
    assert [x[0] for x in again] == [epochs[place], unit[place], row[place]]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [Plan([64] * 4, seed).locate(np.arange(e * 256, (e + 1) * 256)) for seed in (0, 1) for e in (0, 1)]
    assert len({(order[1] * 64 + order[2]).tobytes() for order in orders}) == 4


@pytest.fixture(scope="module")
def unit():
    return random_rows(2000, 64, documents=300, seed=5)


@pytest.fixture(scope="module")
def samples(unit):
    rows = np.arange(2000)
    return built(unit, rows, fold(0, 0, 0, rows), 64)


def built(unit, rows, keys, seq_len, spec=ORIGINAL):
    columns = empty(len(rows), seq_len, spec)
    build(unit, rows, keys, rows, columns, spec)
    return columns


def originals(columns):
    """The ids before masking."""
    ids = columns["input_ids"].copy()
    rows, places = np.nonzero(columns["masked_positions"] >= 0)
    ids[rows, columns["masked_positions"][rows, places]] = columns["masked_labels"][rows, places]
    return ids


def test_the_layout_is_cls_a_sep_b_sep(samples):
    ids = originals(samples)
    place = np.arange(64)
    assert (ids[:, 0] == CLS_ID).all()
    cut, length = samples["cut"][:, None], samples["length"][:, None]
    assert (ids[place == cut - 1] == SEP_ID).all()
    assert (ids[place == length - 1] == SEP_ID).all()
    assert (ids[place >= length] == PAD_ID).all()
    inside = (place > 0) & (place < length - 1) & (place != cut - 1)
    assert (ids[inside] < NUM_TEXT_TOKENS).all()
    assert (samples["cut"] >= 3).all()
    assert (samples["length"] - samples["cut"] >= 2).all()
    assert (samples["length"] <= 64).all()


def test_labels_are_balanced_and_a_false_b_is_never_the_true_one(unit, samples):
    labels = samples["next_sentence_label"]
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)
    ids = originals(samples)
    for row in range(2000):
        start = unit.token_offsets[row]
        a = samples["cut"][row] - 2
        b = samples["length"][row] - samples["cut"][row] - 1
        assert (ids[row, 1 : 1 + a] == unit.tokens[start : start + a]).all()
        same = (ids[row, a + 2 : a + 2 + b] == unit.tokens[start + a : start + a + b]).all()
        assert same == (labels[row] == 0)


def test_lengths_do_not_tell_the_label(samples):
    b = samples["length"] - samples["cut"]
    labels = samples["next_sentence_label"].astype(bool)
    difference = b[labels].mean() - b[~labels].mean()
    assert abs(difference) < 4 * b.std() / np.sqrt(500)


def test_fifteen_per_cent_are_chosen_and_treated_80_10_10(samples):
    positions, chosen = samples["masked_positions"], samples["masked_positions"] >= 0
    text = samples["length"] - 3
    assert (chosen.sum(1) == np.clip(np.rint(MASKED_FRACTION * text), 1, max_masked(64))).all()
    rows, places = np.nonzero(chosen)
    where = positions[rows, places]
    assert ((where > 0) & (where != samples["cut"][rows] - 1) & (where < samples["length"][rows] - 1)).all()
    assert all((np.diff(p[p >= 0]) > 0).all() for p in positions)
    now, before = samples["input_ids"][rows, where], samples["masked_labels"][rows, places]
    n = len(now)
    for share, flags in ((0.8, now == MASK_ID), (0.1, now == before), (0.1, (now != MASK_ID) & (now != before))):
        assert abs(flags.mean() - share) < 4 * np.sqrt(share * (1 - share) / n)
    replaced = now[(now != MASK_ID) & (now != before)].astype(float)
    assert replaced.max() < NUM_TEXT_TOKENS
    assert abs(replaced.mean() / NUM_TEXT_TOKENS - 0.5) < 4 * 0.29 / np.sqrt(len(replaced))
    # Every text position is as likely as any other: compare with the mean of the sample's own.
    place = np.arange(64)
    cut, length = samples["cut"][:, None], samples["length"][:, None]
    eligible = (place > 0) & (place < length - 1) & (place != cut - 1)
    expected = (eligible * place).sum(1) / eligible.sum(1)
    off = (where - expected[rows]) / samples["length"][rows]
    assert abs(off.mean()) < 4 * 0.29 / np.sqrt(n)


@pytest.mark.parametrize("kinds", [2**3, 2**36, 2**64 - 1])
def test_the_lowest_scores_are_taken_also_where_many_are_equal_or_nearly(monkeypatch, kinds):
    """Scores that differ in their low bits alone, or in their high ones alone, against a plain sort."""
    rng, length = np.random.default_rng(0), np.array([5, 20, 64, 64, 33] * 40)
    cut = rng.integers(2, length - 2)
    score = rng.integers(0, kinds, (200, 64), dtype=np.uint64)
    if kinds == 2**3:
        score <<= np.uint64(40)
    monkeypatch.setattr(masking, "bits", lambda keys, purpose, count: score.copy())
    wanted = np.clip(np.rint(MASKED_FRACTION * (length - 3)).astype(int), 1, max_masked(64))
    rows, places = np.divmod(masking._choose(cut, length, np.zeros(200, np.uint64), wanted, 64), 64)
    for row in range(200):
        text = [place for place in range(1, length[row] - 1) if place != cut[row] - 1]
        chosen = sorted(places[rows == row])
        lowest = sorted(score[row, text] >> np.uint64(1))[: wanted[row]]
        assert set(chosen) <= set(text)
        assert sorted(score[row, chosen] >> np.uint64(1)) == lowest


def test_samples_stay_what_they_are():
    """A run that is begun goes on with the same samples after an update of raybert."""
    unit, rows = random_rows(500, 48, documents=70, seed=8), np.arange(500)
    digest = hashlib.sha256()
    for name, values in built(unit, rows, fold(1, 2, 3, rows), 48).items():
        if name != "document":  # which tells samples apart, and is no part of one
            digest.update(values.tobytes())
    assert digest.hexdigest()[:16] == "e82906bf59b2de9e"


@settings(max_examples=30)
@given(rows=st.lists(st.integers(0, 199), min_size=1, max_size=30, unique=True), seed=st.integers(0, 9))
def test_a_sample_does_not_depend_on_its_batch(rows, seed):
    unit = random_rows(200, 32, documents=20, seed=1)
    rows = np.array(rows)
    together = built(unit, rows, fold(seed, 2, 0, rows), 32)
    for place, row in enumerate(rows):
        alone = built(unit, np.array([row]), fold(seed, 2, 0, np.array([row])), 32)
        for name, values in alone.items():
            assert np.array_equal(values[0], together[name][place]), name


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")))


def test_ranks_and_starts_cut_the_same_sequence(shards):
    whole = iter_batches(shards.uri, seed=1, global_batch_size=12)
    steps = [next(whole) for _ in range(60)]  # beyond the end of the first epoch
    for world_size in (2, 3):
        parts = [
            iter_batches(shards.uri, seed=1, global_batch_size=12, start_step=57, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for step in steps[57:]:
            got = [next(part) for part in parts]
            for name, values in step.items():
                assert np.array_equal(values, np.concatenate([g[name] for g in got])), name
    assert steps[0]["input_ids"].dtype == np.int64
    assert steps[0]["attention_mask"].dtype == bool
    assert (np.concatenate([s["index"] for s in steps]) == np.arange(720)).all()


def test_seeking_reads_only_the_units_of_the_step(shards, monkeypatch):
    from raybert.data import reader

    read = []
    real = reader.read_unit
    monkeypatch.setattr(reader, "read_unit", lambda *given: read.append(given[1]) or real(*given))
    SampleReader(shards, seed=0).build(np.arange(12_000_000, 12_000_012))
    assert len(read) <= 2
