"""Ranked lists: ties, blocks, and the baselines of words beside the libraries that they are made with."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.probe import kinds, ranking
from raybert.probe.kind import digest
from raybert.probe.nearest import Best
from raybert.probe.retrieval import Ranked, from_right_pairs
from raybert.probe.tasks import held_out, parse_task

RETRIEVAL = kinds.KINDS["retrieval"]
TASK = parse_task({"kind": "retrieval", "name": "found", "pairs": "pairs.jsonl"}, "here")


def relevance(right: dict[tuple[int, int], float], queries: int, documents: int) -> ranking.Relevance:
    keys = sorted(right)
    query, document = map(np.array, zip(*keys, strict=True))
    return ranking.Relevance(query, document, np.array([right[key] for key in keys]), queries, documents)


def best(queries: np.ndarray, documents: np.ndarray, *, kept: int = 100, block: int = 7, order=None) -> np.ndarray:
    """Document numbers by `Best`, to which they come in blocks and in any order."""
    found = Best(queries, kept)
    order = np.arange(len(documents)) if order is None else order
    for first in range(0, len(order), block):
        found.add(order[first : first + block], documents[order[first : first + block]])
    return found.ranked()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 60), st.integers(1, 20), st.integers(0, 999))
def test_of_equal_documents_the_larger_number_comes_first_whatever_the_blocks(kept, documents, block, seed):
    rng = np.random.default_rng(seed)
    few = rng.normal(size=(3, 16))  # so that many documents are the same, but for their length
    vectors = (few[rng.integers(0, 3, documents)] * 2.0 ** rng.integers(-2, 3, (documents, 1))).astype(np.float32)
    queries = rng.normal(size=(4, 16)).astype(np.float32)
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scores = (queries @ unit.T).round(5)
    wanted = np.array([np.lexsort((-np.arange(documents), -row))[:kept] for row in scores])
    found = best(queries, vectors, kept=kept, block=block, order=rng.permutation(documents))
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("block", [1, 17, 200])
def test_a_collapsed_encoder_is_ranked_as_trec_ranks_ties(block):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    same = np.tile(np.random.default_rng(0).normal(size=(1, 24)).astype(np.float32), (200, 1))
    ranked = best(same[:40], same, block=block)
    right = {(query, query * 5): 1.0 for query in range(40)}
    found = ranking.figures(ranked, relevance(right, 40, 200))
    run = {f"q{q}": {f"d{d:03}": 1.0 for d in range(200)} for q in range(40)}
    judged = {f"q{q}": {f"d{d:03}": 1} for q, d in right}
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100", "recip_rank"}).evaluate(run)
    assert found["ndcg_at_10"] == pytest.approx([theirs[f"q{q}"]["ndcg_cut_10"] for q in range(40)])
    assert found["recall_at_100"] == pytest.approx([theirs[f"q{q}"]["recall_100"] for q in range(40)])
    assert found["mrr_at_10"].mean() < 0.02


def test_collapsed_vectors_are_told_of():
    rng = np.random.default_rng(0)
    pairs = [(f"query {number}", f"document {number}") for number in range(20)]
    data = from_right_pairs("retrieval", TASK, pairs, 20, 0)
    apart = rng.normal(size=(40, 8)).astype(np.float32)
    found = RETRIEVAL.judge(data, {"mean": apart, "cls": 1 + 1e-4 * apart})
    assert "collapsed" not in found["mean"]
    assert found["mean"]["deviation"] == pytest.approx(1, rel=0.2)
    assert "vary by only 0.009 % of their length" in found["cls"]["collapsed"]


def test_ties_are_those_of_sentence_transformers_with_ids_that_fall():
    """Of equal documents it takes the smallest id first, so the numbers are named from the end."""
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    rng = np.random.default_rng(1)
    few = rng.normal(size=(9, 16)).astype(np.float32)
    documents, queries = few[rng.integers(0, 9, 150)], rng.normal(size=(25, 16)).astype(np.float32)
    right = {(query, int(document)): 1.0 for query in range(25) for document in rng.choice(150, 3, replace=False)}
    ids = [f"d{150 - number:03}" for number in range(150)]
    judged: dict[str, set] = {}
    for query, document in right:
        judged.setdefault(f"q{query}", set()).add(ids[document])
    evaluator = evaluation.InformationRetrievalEvaluator(
        {f"q{query}": "" for query in range(25)},
        dict.fromkeys(ids, ""),
        judged,
        corpus_chunk_size=40,
        precision_recall_at_k=[1, 10, 100],
        score_functions={"cosine": None},
        main_score_function="cosine",
        write_csv=False,
    )
    similarity = torch.nn.functional.normalize
    scores = similarity(torch.from_numpy(queries), dim=1) @ similarity(torch.from_numpy(documents), dim=1).T
    hits = [[{"corpus_id": ids[d], "score": round(float(row[d]), 5)} for d in range(150)] for row in scores]
    theirs = evaluator.compute_metrics(hits)
    found = ranking.figures(best(queries, documents), relevance(right, 25, 150))
    assert found["mrr_at_10"].mean() == pytest.approx(theirs["mrr@k"][10])
    assert found["ndcg_at_10"].mean() == pytest.approx(theirs["ndcg@k"][10])
    for k in (1, 10, 100):
        assert found[f"recall_at_{k}"].mean() == pytest.approx(theirs["recall@k"][k])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(0, 99))
def test_documents_may_come_before_the_queries(block, seed):
    """As in a pass over two tasks, where one asks for what the other looks through."""
    rng = np.random.default_rng(seed)
    data = from_right_pairs("retrieval", TASK, [(f"q{i}", f"d{i}") for i in range(30)], 25, 0)
    vectors = {"mean": rng.normal(size=(len(data.texts), 8)).astype(np.float32)}
    wanted = RETRIEVAL.judge(data, vectors)
    collector, order = RETRIEVAL.collector(data), rng.permutation(len(data.texts))
    for first in range(0, len(order), block):
        rows = order[first : first + block]
        collector.add(rows, {"mean": vectors["mean"][rows]})
    assert collector.finish() == wanted


WORDS = ["bank", "share", "profit", "rain", "wind", "sun", "a", "of"]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None)
@given(TEXTS, TEXTS)
def test_bm25_is_the_library_s_over_all_words(queries, documents):
    import bm25s

    found = ranking.bm25(queries, documents, kept=10)
    index, options = bm25s.BM25(), {"stopwords": [], "show_progress": False}
    words = bm25s.tokenize(documents, **options)
    if set(words.vocab) <= {""}:
        assert found is None
        return
    index.index(words, show_progress=False)
    for row, asked in zip(found, bm25s.tokenize(queries, return_ids=False, **options), strict=True):
        known = [word for word in asked if word in words.vocab and word]
        scores = index.get_scores(known) if known else np.zeros(len(documents), np.float32)
        wanted = [number for number in np.lexsort((-np.arange(len(scores)), -scores))[:10] if scores[number] > 0]
        assert [number for number in row if number >= 0] == wanted


@settings(max_examples=25, deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 200))
def test_tfidf_in_blocks_is_scikit_learns(queries, documents, block):
    from sklearn.feature_extraction.text import TfidfVectorizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "WEIGHED_AT_ONCE", block)
        found = ranking.tfidf(queries, documents, kept=10)
    if not any(word in text.split() for text in documents for word in WORDS if len(word) > 1):
        assert found is None
        return
    vectorizer = TfidfVectorizer()
    columns = vectorizer.fit_transform(documents)
    for row, scores in zip(found, (vectorizer.transform(queries) @ columns.T).toarray(), strict=True):
        ranked = row[row >= 0]
        assert len(ranked) == min(10, (scores > 0).sum())
        assert scores[ranked] == pytest.approx(np.sort(scores)[::-1][: len(ranked)], abs=1e-6)


def test_what_is_digested_is_what_python_writes():
    import hashlib

    for part in ([], ["a", "b"], [("a", 1), ("\ud800", 0.5)], [1.0], "text", 3, {"a": [1]}, ["'", '"', ["x"]]):
        wanted = hashlib.sha256(repr(part).encode("utf-8", "surrogatepass") + b"\0").hexdigest()
        assert digest(part) == wanted


def test_all_queries_and_the_right_documents_are_held_out(tmp_path):
    for name, rows in (
        ("q", [{"id": i, "text": f"query {i}"} for i in range(60)]),
        ("d", [{"id": i, "text": f"document {i}"} for i in range(90)]),
        (
            "r",
            [{"query_id": i, "document_id": i + 10, "score": i % 2} for i in range(60)]
            + [{"query_id": i, "document_id": i, "score": 1} for i in range(60)],
        ),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {key: str(tmp_path / f"{key[0]}.jsonl") for key in ("queries", "documents", "relevance")}
    task = parse_task({"kind": "retrieval", "name": "ids", "n_queries": 20, **files}, "here")
    wanted = [f"query {i}" for i in range(60)] + [f"document {i}" for i in (*range(60), *range(61, 70, 2))]
    assert sorted(RETRIEVAL.held_out(task)) == sorted(wanted)
    assert len(held_out([task])) == len(wanted)
    data = RETRIEVAL.read(task)
    assert isinstance(data, Ranked)
    assert (data.relevance.queries, data.relevance.documents) == (20, 90)
    # By their ids, so that the larger number is the larger id.
    assert data.documents == [f"document {i}" for i in sorted(range(90), key=str)]
