"""The probe's second figure: C chosen on held-out training texts, and how far the vectors spread."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from raybert.encode import POOLINGS
from raybert.encode.encoders import RaybertEncoder
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.probe import classify, tune
from raybert.probe.baselines import Cache
from raybert.probe.compare import compare
from raybert.probe.evaluate import evaluate, prepare
from raybert.probe.show import comparison_table, format_block, result_table, results_table
from raybert.probe.spread import spread
from raybert.probe.tasks import load_task
from tests.tasks import make_task


def printed(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def clouds(n=300, d=6, classes=3, seed=0):
    """Vectors of classes that overlap, split into (train_x, train_y, test_x, test_y)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = (rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))).astype(np.float32)
    return x[: n // 2], y[: n // 2], x[n // 2 :], y[n // 2 :]


def tuned(train_x, train_y, test_x, test_y):
    sides = train_x, train_y, test_x, test_y
    return tune.tune(*sides, classify.fit(*sides))


@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=6), seed=st.integers(0, 9))
def test_a_fifth_with_every_class_is_held_out_or_nothing(counts, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = tune.split(labels)
    assert (parts is None) == (min(counts) < 5)
    if parts is not None:
        kept, held = parts
        assert sorted([*kept, *held]) == list(range(len(labels)))
        assert len(held) == -(-len(labels) // 5)
        assert set(labels[held]) == set(labels[kept]) == set(labels)
        np.testing.assert_array_equal(tune.split(labels)[1], held)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_c_is_the_one_that_scikit_learn_s_search_finds(scale, classes):
    train_x, train_y, test_x, test_y = clouds(classes=classes)
    train_x, test_x = scale * train_x, scale * test_x
    found = tuned(train_x, train_y, test_x, test_y)
    search = GridSearchCV(
        LogisticRegression(max_iter=10_000, tol=1e-6), {"C": list(tune.VALUES)}, cv=[tune.split(train_y)]
    ).fit(train_x, train_y)
    assert found.c == search.best_params_["C"]
    assert found.accuracy == pytest.approx(search.score(test_x, test_y), abs=1 / len(test_y))
    assert found.interval[0] < found.accuracy < found.interval[1]


def test_the_scale_of_the_vectors_is_no_part_of_the_tuned_figure():
    train_x, train_y, test_x, test_y = clouds(n=600)
    one = tuned(0.3 * train_x, train_y, 0.3 * test_x, test_y)
    assert tune.VALUES[0] < one.c < 10, "no room for the other scale"
    small = tuned(0.03 * train_x, train_y, 0.03 * test_x, test_y)  # the same problem with a hundred times C
    assert small.c == pytest.approx(100 * one.c)
    assert small.accuracy == pytest.approx(one.accuracy, abs=1 / len(test_y))
    usual = [classify.fit(s * train_x, train_y, s * test_x, test_y).test_accuracy for s in (0.3, 0.003)]
    assert usual[1] < usual[0] - 0.02, "with C = 1 it is"


def test_test_texts_have_no_part_in_the_choice_and_c_1_is_the_headline():
    train_x, train_y, test_x, test_y = clouds()
    one = tuned(train_x, train_y, test_x, test_y)
    assert tuned(train_x, train_y, test_x[::-1] + 5, test_y).c == one.c
    few = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    sides = train_x[:10], few, test_x, test_y % 2
    score = classify.fit(*sides)
    found = tune.tune(*sides, score)
    assert (found.c, found.accuracy) == (1.0, score.test_accuracy)
    assert "class no has 4 training texts" in (said := tune.describe(few, ["no", "yes"]))
    assert "needs at least 5 of each" in said
    assert "on 30 held-out training texts" in tune.describe(train_y, ["a", "b", "c"])


@given(d=st.integers(2, 12), k=st.integers(1, 12), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_the_spread_does_not_depend_on_the_scale_and_its_rank_is_that_of_the_vectors(d, k, scale, seed):
    rng = np.random.default_rng(seed)
    k = min(k, d)
    directions = np.linalg.qr(rng.normal(size=(d, d)))[0][:k]
    vectors = rng.normal(size=(400, k)) @ directions  # in k directions alike
    found, scaled = spread(vectors), spread(scale * vectors)
    assert 1 <= found.effective_rank <= k + 1e-6
    assert found.effective_rank > 0.9 * k
    assert scaled.effective_rank == pytest.approx(found.effective_rank)
    assert scaled.deviation == pytest.approx(scale * found.deviation)
    assert found.deviation == pytest.approx(np.sqrt(vectors.var(axis=0).mean()))
    assert bool(found.collapsed) == (k == 1)


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (np.ones((50, 8), dtype=np.float32), "by only 0 % of their length"),
        (np.zeros((50, 8), dtype=np.float32), "by only 0 % of their length"),
        (1 + 1e-3 * np.random.default_rng(0).normal(size=(50, 8)), "by only 0.1 % of their length"),
        (np.linspace(-1, 1, 50)[:, None] * np.ones(8), "along one line (effective rank 1.0)"),
    ],
)
def test_vectors_that_have_collapsed_are_told_of(vectors, sentence):
    found = spread(vectors)
    assert sentence in found.collapsed
    assert found.record()["collapsed"] == found.collapsed
    assert found.effective_rank >= 0
    assert np.isfinite(found.effective_rank)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    torch.manual_seed(3)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    folder = tmp_path_factory.mktemp("probe")
    encoder = RaybertEncoder(Bert(config))
    material = prepare(load_task(make_task(folder)), encoder.tokenize, encoder.positions)
    return {**evaluate(encoder, material, Cache(str(folder))), "step": 20, "status": "done", "run": "a"}


def test_every_figure_of_a_record_has_its_tuned_one_beside_it(record):
    assert "on 24 held-out training texts" in record["tuning"]
    for entry in (record["baselines"]["tfidf"], *(record[p] for p in POOLINGS)):
        assert 0 <= entry["tuned_accuracy"] <= 1
        assert entry["tuned_c"] in tune.VALUES
        assert entry["tuned_interval"][0] <= entry["tuned_accuracy"] <= entry["tuned_interval"][1]
    for pooling in POOLINGS:
        for entry in (record[pooling], record["baselines"]["untrained"][pooling]):
            assert entry["deviation"] > 0
            assert 1 <= entry["effective_rank"] <= 16
    assert "tuned_accuracy" not in record["baselines"]["majority"]


def test_tuned_figures_are_shown_and_compared(record):
    score = record["mean"]
    cell = f"{100 * score['tuned_accuracy']:.1f} (C {score['tuned_c']:g})"
    for table in (result_table(record), results_table([record])):
        assert cell in printed(table)
    assert record["tuning"] in " ".join(printed(result_table(record)).split())
    assert f"mean {score['tuned_accuracy']:.4f} (C = {score['tuned_c']:g})" in format_block(record)
    found = compare(record, record)
    assert found["mean"]["tuned"]["difference"] == 0
    assert (found["mean"]["tuned"]["a"], found["mean"]["tuned"]["b_c"]) == (score["tuned_accuracy"], score["tuned_c"])
    assert "mean, C tuned" in printed(comparison_table(found))
    older = {key: value for key, value in record.items() if key not in ("tuned_correct", "tuning")}
    assert "tuned" not in compare(older, record)["mean"]
    assert "C tuned" not in printed(comparison_table(compare(record, older)))


def test_a_collapse_is_told_of_in_the_log_and_in_the_table(record):
    told = {**record, "cls": record["cls"] | {"collapsed": "The vectors have collapsed: all the same."}}
    assert "cls: The vectors have collapsed: all the same." in format_block(told)
    assert "cls: The vectors have collapsed: all the same." in printed(result_table(told))
