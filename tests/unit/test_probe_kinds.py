"""Kinds of probes beside their authorities, and what each refuses."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import raybert
from raybert.encode.encoders import Encoder, RaybertEncoder
from raybert.encode.vectors import pad
from raybert.errors import InputError, RunFailed
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.probe import baselines, kinds, measure, plan, ranking, record, statistics, training
from raybert.probe.baselines import Cache
from raybert.probe.compare import compare
from raybert.probe.evaluate import evaluate, evaluate_all, prepare
from raybert.probe.nearest import Best
from raybert.probe.service import work
from raybert.probe.show import comparison_table, format_block, result_table, results_table
from raybert.probe.tasks import held_out, load_task
from raybert.report.trackers import probe_figures
from tests.data import make_shards

WORDS = [
    *("bank", "share", "profit", "market", "price", "match", "goal", "player"),
    *("team", "win", "vote", "party", "law", "rain", "wind", "sun"),
]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(3)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
    return RaybertEncoder(Bert(config).eval())


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(4, 9)))


def write(folder: Path, name: str, rows: list[dict], **task) -> str:
    """A task of one jsonl file; the path of its YAML file."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": name, **task}
    (folder / f"{name}.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in task.items()))
    return str(folder / f"{name}.yaml")


def pairs(n: int = 60) -> list[dict]:
    """Pairs of which those that share more words have higher scores."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        text1 = sentence(rng)
        words = text1.split()
        kept = rng.integers(0, len(words) + 1)
        rows.append({"text1": text1, "text2": f"{' '.join(words[:kept])} {sentence(rng)} {i}", "label": float(kept)})
    return rows


def similarity(folder: Path, rows: list[dict] | None = None, **task) -> str:
    return write(folder, "alike", pairs() if rows is None else rows, kind="similarity", test="alike.jsonl", **task)


def retrieval(folder: Path, rows: list[dict] | None = None, **task) -> str:
    task = {"kind": "retrieval", "pairs": "found.jsonl", "text": ["text1", "text2"], **task}
    return write(folder, "found", pairs() if rows is None else rows, **task)


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


# -- similarity -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=30))
def test_correlations_are_scipys(values):
    x, y = np.array(values, dtype=float).T
    for ours, theirs in ((statistics.spearman, stats.spearmanr), (statistics.pearson, stats.pearsonr)):
        found = ours(x[None], y[None])[0]
        if np.ptp(x) and np.ptp(y):
            assert found == pytest.approx(theirs(x, y).statistic, abs=1e-9)
        else:
            assert found == 0.0
    rows = np.random.default_rng(len(x)).integers(len(x), size=(20, len(x)))
    assert np.array_equal(statistics.spearman_of_samples(x, y, rows), statistics.spearman(x[rows], y[rows]))


def test_similarity_has_what_scipy_finds_in_the_cosines(encoder, tmp_path):
    task = load_task(similarity(tmp_path))
    material = prepare(task, encoder.tokenize, 64)
    found = evaluate(encoder, material, Cache(str(tmp_path / "cache")), start="untrained")
    vectors = measure.embed(encoder, material.sequences)["mean"]
    ours = np.diag(cosines(vectors)[:60, 60:])
    assert found["mean"]["spearman"] == pytest.approx(stats.spearmanr(ours, material.data.scores).statistic, abs=1e-4)
    assert found["mean"]["pearson"] == pytest.approx(stats.pearsonr(ours, material.data.scores).statistic, abs=1e-4)
    low, high = found["mean"]["interval"]
    assert low < found["mean"]["spearman"] < high
    assert found["kind"] == "similarity"
    assert found["n_test"] == 60
    assert set(found["baselines"]) == {"untrained", "tfidf", "start"}
    assert found["baselines"]["tfidf"]["spearman"] > 0.5
    assert set(found["beyond_start"]) == {"pooler", "cls", "mean"}


def test_every_reader_takes_a_record_of_any_kind(encoder, tmp_path):
    make_shards(str(tmp_path / "shards"), rows=60, validation=60, vocabulary=300)
    specs = [similarity(tmp_path), retrieval(tmp_path), f"neighbours@{tmp_path / 'shards'}"]
    for spec in specs:
        material = prepare(load_task(spec), encoder.tokenize, 64)
        found = {"step": 5, "run": "r", **evaluate(encoder, material, Cache(str(tmp_path / "c")), start="untrained")}
        parsed = record.parse(json.dumps(found).encode())
        headline = kinds.of_record(parsed).headline
        assert headline.title in format_block(parsed)
        assert result_table(parsed).row_count >= 7
        assert results_table([parsed]).row_count == 1
        difference = compare(parsed, parsed)
        assert difference["mean"]["difference"] == 0.0
        assert difference["mean"]["a"] == parsed["mean"][headline.key]
        assert comparison_table(difference).row_count == 3
        shown = probe_figures(parsed)
        assert shown[f"probe/{parsed['task']}/mean"] == parsed["mean"][headline.key]
        assert f"probe/{parsed['task']}/tfidf" in shown
        listed = {(name, pooling): value for name, pooling, value in kinds.baselines(parsed)}
        assert listed["tfidf", ""] == shown[f"probe/{parsed['task']}/tfidf"]
        assert (
            listed["start", "cls"]
            == listed["untrained", "cls"]
            == parsed["baselines"]["untrained"]["cls"][headline.key]
        )
    with pytest.raises(InputError, match="different texts"):
        compare(parsed, {**parsed, "texts": "other"})
    with pytest.raises(ValueError, match="less than or equal to 1"):
        record.parse(json.dumps({**parsed, "mean": {**parsed["mean"], headline.key: 1.5}}).encode())


def test_two_checkpoints_compare_on_each_kind(encoder, tmp_path):
    make_shards(str(tmp_path / "shards"), rows=60, validation=60, vocabulary=300)
    classes(tmp_path, epochs=1)
    task = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    specs = [
        similarity(tmp_path),
        retrieval(tmp_path),
        f"neighbours@{tmp_path / 'shards'}",
        str(tmp_path / "tuned.yaml"),
    ]
    specs.append(write(tmp_path, "read", [], kind="classification", **task))
    torch.manual_seed(9)
    other = RaybertEncoder(Bert(encoder.module.config).eval())
    seen = set()
    for spec in specs:
        material, cache = prepare(load_task(spec), encoder.tokenize, 64), Cache(str(tmp_path / "c"))
        a, b = ({"step": 1, "run": "r", **evaluate(one, material, cache)} for one in (encoder, other))
        found, headline = compare(a, b), kinds.of_record(a).headline
        for pooling in kinds.poolings(a):
            row = found[pooling]
            assert (row["a"], row["b"]) == (headline.of(a[pooling]), headline.of(b[pooling]))
            assert row["difference"] == pytest.approx(row["b"] - row["a"], abs=1e-6)
            low, high = row["interval"]
            assert low <= high
            assert 0 < row["p_value"] <= 1
            back = compare(b, a)[pooling]
            assert back["difference"] == pytest.approx(-row["difference"], abs=1e-6)
        assert comparison_table(found).row_count >= len(kinds.poolings(a)) > 0
        json.dumps(found, allow_nan=False)
        seen.add(kinds.of_record(a).name)
    assert seen == set(kinds.KINDS)


def test_a_record_that_lacks_figures_is_shown_without_them(encoder, tmp_path):
    material = prepare(load_task(similarity(tmp_path)), encoder.tokenize, 64)
    found = {"step": 5, "run": "r", **evaluate(encoder, material, Cache(str(tmp_path / "c")), start="untrained")}
    for pooling in ("pooler", "cls", "mean"):
        del found[pooling]["interval"], found["beyond_start"][pooling]["p_value"]
    parsed = record.parse(json.dumps(found).encode())
    assert f"mean {found['mean']['spearman']:.4f}\n" in format_block(parsed)
    assert results_table([parsed]).row_count == 1
    assert result_table(parsed).row_count >= 7


def test_better_vectors_compare_as_better(tmp_path):
    kind = kinds.KINDS["similarity"]
    rng = np.random.default_rng(0)
    scores = rng.normal(size=200)
    data = type("Data", (), {"scores": scores})
    texts = rng.normal(size=(2, 200, 8))

    def judged(noise: float) -> dict:
        vectors = np.concatenate([texts[0], texts[0] * scores[:, None] + noise * texts[1]]).astype(np.float32)
        return kind.judge(data, {"mean": vectors}) | {"n_test": 200, "texts": "t"}

    good, bad = judged(0.1), judged(30.0)
    found = kind.compare(bad, good, "mean")
    assert found["difference"] == pytest.approx(good["mean"]["spearman"] - bad["mean"]["spearman"], abs=1e-3)
    assert found["interval"][0] > 0
    assert found["p_value"] < 0.01


# -- retrieval --------------------------------------------------------------------------------------------------------


def test_ranked_lists_are_judged_as_trec_does():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 300))
    right = {(q, int(d)): float(rng.integers(1, 4)) for q in range(40) for d in rng.choice(300, rng.integers(1, 15))}
    keys = sorted(right)
    relevance = ranking.Relevance(*map(np.array, zip(*keys, strict=True)), np.array([right[k] for k in keys]), 40, 300)
    found = ranking.figures(np.argsort(-scores)[:, :100], relevance)
    judged = {f"q{q}": {f"d{d}": int(g) for (other, d), g in right.items() if other == q} for q in range(40)}
    run = {f"q{q}": {f"d{d}": float(scores[q, d]) for d in range(300)} for q in range(40)}
    names = {"ndcg_at_10": "ndcg_cut_10", **{f"recall_at_{k}": f"recall_{k}" for k in (1, 10, 100)}}
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.1,10,100", "recip_rank"})
    of_queries = theirs.evaluate(run)
    for ours, name in names.items():
        assert found[ours] == pytest.approx([of_queries[f"q{q}"][name] for q in range(40)])
    ranks = np.array([of_queries[f"q{q}"]["recip_rank"] for q in range(40)])
    assert found["mrr_at_10"] == pytest.approx(np.where(ranks >= 0.1, ranks, 0.0))


def test_retrieval_finds_what_sentence_transformers_finds(encoder, tmp_path):
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    task = load_task(retrieval(tmp_path, n_queries=40))
    material = prepare(task, encoder.tokenize, 64)
    found = evaluate(encoder, material, Cache(str(tmp_path / "cache")))
    vectors = dict(zip(material.data.texts, measure.embed(encoder, material.sequences)["mean"], strict=True))

    class Model:
        similarity_fn_name = "cosine"
        model_card_data = type("Card", (), {"set_evaluation_metrics": lambda *_: None})()

        @staticmethod
        def similarity(a, b):
            return torch.nn.functional.normalize(a.float(), dim=1) @ torch.nn.functional.normalize(b.float(), dim=1).T

        @staticmethod
        def encode(texts, **_):
            return torch.from_numpy(np.stack([vectors[text] for text in texts]))

        encode_query = encode_document = encode

    data = material.data
    queries = {f"q{i}": text for i, text in enumerate(data.queries)}
    corpus = {f"d{i}": text for i, text in enumerate(data.documents)}
    relevant: dict[str, set] = {}
    for q, d in zip(data.relevance.query, data.relevance.document, strict=True):
        relevant.setdefault(f"q{q}", set()).add(f"d{d}")
    theirs = evaluation.InformationRetrievalEvaluator(
        queries,
        corpus,
        relevant,
        precision_recall_at_k=[1, 10, 100],
        write_csv=False,
        main_score_function="cosine",
        score_functions={"cosine": Model.similarity},
    )(Model())
    for ours, name in {"ndcg_at_10": "ndcg@10", "mrr_at_10": "mrr@10", "recall_at_10": "recall@10"}.items():
        assert found["mean"][ours] == pytest.approx(theirs[f"cosine_{name}"], abs=1e-6)
    assert found["n_test"] == 40
    assert found["baselines"]["bm25"]["ndcg_at_10"] > 0.3


def test_vectors_that_are_not_finite_are_no_result(encoder, tmp_path):
    broken = copy.deepcopy(encoder)
    with torch.no_grad():
        broken.module.pooler.weight[0, 0] = float("nan")
    material = prepare(load_task(similarity(tmp_path)), broken.tokenize, 64)
    with pytest.raises(RunFailed, match=r"vectors \(pooler\) are not finite"):
        measure.measure(broken, [material])


def test_texts_of_shards_that_were_replaced_are_read_again(tmp_path):
    task = load_task(f"neighbours@{make_shards(str(tmp_path / 'shards')).uri}")
    entry = SimpleNamespace(positions=64, tokenizer="")
    before = work.texts_key(task, entry)
    assert work.texts_key(task, entry) == before
    make_shards(str(tmp_path / "shards"), rows=200)
    assert work.texts_key(task, entry) != before
    assert work.texts_key(task, SimpleNamespace(positions=64, tokenizer="another")) != work.texts_key(task, entry)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 90), st.integers(1, 30), st.integers(0, 99))
def test_the_best_are_the_same_whatever_the_blocks(kept, documents, block, seed):
    rng = np.random.default_rng(seed)
    queries, vectors = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(documents, 8)).astype(np.float32)
    best = Best(queries, kept)
    for first in range(0, documents, block):
        numbers = np.arange(first, min(first + block, documents))
        best.add(numbers, vectors[numbers])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.array_equal(best.ranked(), np.argsort(-(queries @ unit.T), axis=1)[:, :kept])


def test_documents_of_the_same_text_are_both_right(encoder, tmp_path):
    rng = np.random.default_rng(1)
    texts = [f"{sentence(rng)} {i}" for i in range(30)]
    for name, rows in (
        ("q", [{"id": f"q{i}", "text": text} for i, text in enumerate(texts)]),
        ("d", [{"id": f"d{i}", "text": text} for i, text in enumerate([*texts, texts[0]])]),
        ("r", [{"query_id": f"q{i}", "document_id": f"d{i}", "score": 1} for i in range(30)]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"queries": "q.jsonl", "documents": "d.jsonl", "relevance": "r.jsonl"}
    task = load_task(write(tmp_path, "ids", [], kind="retrieval", **files))
    data = prepare(task, encoder.tokenize, 64).data
    right = data.relevance.document[data.relevance.query == 0]
    assert [data.documents[number] for number in right] == [texts[0]] * 2
    found = evaluate(encoder, prepare(task, encoder.tokenize, 64), Cache(str(tmp_path / "cache")))
    assert found["mean"]["ndcg_at_10"] == pytest.approx(1.0)  # every query is its own document
    with open(tmp_path / "q.jsonl", "a") as file:
        file.write('{"id": "lost", "text": "nothing fits"}\n')
    with pytest.raises(InputError, match="The query lost of the probe task ids has no relevant document"):
        load_task(str(tmp_path / "ids.yaml"))


# -- neighbours, and tasks together -----------------------------------------------------------------------------------


def test_neighbours_needs_nothing_but_shards(encoder, tmp_path):
    make_shards(str(tmp_path), rows=60, validation=80, vocabulary=300)
    task = load_task(f"neighbours@{tmp_path}")
    material = prepare(task, encoder.tokenize, 64)
    assert 20 <= material.data.relevance.queries <= 80
    found = evaluate(encoder, material, Cache(str(tmp_path / "cache")))
    assert {"mrr_at_10", "recall_at_1", "interval"} <= set(found["mean"])
    assert set(found["baselines"]) == {"bm25", "tfidf", "untrained"}
    assert prepare(task, encoder.tokenize, 64).data.hash == material.data.hash
    assert held_out([task]) == frozenset()
    with pytest.raises(InputError, match=r"write neighbours@SHARDS"):
        load_task("neighbours")
    make_shards(str(tmp_path / "few"), rows=60, validation=5)
    with pytest.raises(InputError, match="needs 20 validation windows"):
        load_task(f"neighbours@{tmp_path / 'few'}")


def test_tasks_are_passed_in_groups_that_read_a_common_file(tmp_path):
    tuned, alike, found = load_task(classes(tmp_path)), load_task(similarity(tmp_path)), load_task(retrieval(tmp_path))
    same = alike.model_copy(update={"name": "same"})
    assert kinds.passes([tuned, alike, found, same]) == [[alike, same], [found], [tuned]]
    assert kinds.passes([]) == []


def test_tasks_that_share_texts_are_encoded_once(encoder, tmp_path, monkeypatch):
    tasks = [load_task(similarity(tmp_path)), load_task(retrieval(tmp_path)), load_task(retrieval(tmp_path, seed=1))]
    materials = [prepare(task, encoder.tokenize, 64) for task in tasks]
    alone = [evaluate(encoder, material, Cache(str(tmp_path / "cache"))) for material in materials]
    encoded: list[int] = []
    embed = measure.embed

    def counted(encoder, sequences, **options):
        encoded.append(len(sequences.cuts))
        return embed(encoder, sequences, **options)

    monkeypatch.setattr(measure, "embed", counted)
    for block in (2**30, 4096):
        encoded.clear()
        monkeypatch.setattr(measure, "BLOCK_BYTES", block)
        together = evaluate_all(encoder, materials, Cache(str(tmp_path / "cache")), starts=[None] * 3)
        assert sum(encoded) == len({text for material in materials for text in material.data.texts})
        for ours, theirs in zip(together, alone, strict=True):
            headline = kinds.of_record(ours).headline
            for pooling in ("pooler", "cls", "mean"):
                assert headline.of(ours[pooling]) == pytest.approx(headline.of(theirs[pooling]), abs=0.02)


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pairs(10), r"has 10 pairs in .*alike.jsonl; a correlation needs at least 20"),
        ([{**row, "label": 2.0} for row in pairs()], "All 60 pairs of the probe task alike have the score 2"),
        ([*pairs(), {"text1": "a", "text2": "b", "label": "high"}], "Line 61 of .*: the score 'high' in column label"),
        ([*pairs(), {"text1": "a", "text2": "b", "label": None}], "Line 61 of .*: the score None in column label"),
        ([*pairs(), {"text1": "a", "text2": "b", "label": "nan"}], "is not a number"),
        ([*pairs(), {"text1": " ", "text2": "b", "label": 1}], "Line 61 of .*: the text in column text1 is empty"),
    ],
)
def test_bad_pairs_are_a_sentence_before_anything_is_trained(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load_task(similarity(tmp_path, rows))


def test_wrong_kinds_and_keys_are_a_sentence(tmp_path):
    with pytest.raises(InputError, match="has the unknown kind similarty; did you mean similarity"):
        load_task(write(tmp_path, "t", [], kind="similarty", test="t.jsonl"))
    with pytest.raises(
        InputError, match=r"key n_queries in the probe task .* belongs to kind retrieval, but the task is"
    ):
        load_task(similarity(tmp_path, n_queries=30))
    with pytest.raises(InputError, match="give either pairs, or all of queries, documents and relevance"):
        load_task(write(tmp_path, "t", [], kind="retrieval", queries="t.jsonl"))
    with pytest.raises(InputError, match="has 10 queries with a relevant document; it needs at least 20"):
        load_task(retrieval(tmp_path, pairs(10)))
    with pytest.raises(InputError, match=r"give both label .* and least .*, or neither"):
        load_task(retrieval(tmp_path, least=4))


def test_a_text_without_a_token_is_named(tmp_path):
    rows = [*pairs(), {"text1": "\u200b", "text2": "b", "label": 1.0}]
    task = load_task(similarity(tmp_path, rows))

    def tokenize(texts, max_tokens):
        """As a WordPiece that drops what it does not know."""
        found = [[1, *([5] * len(text.replace("\u200b", "").split())), 2] for text in texts]
        lengths = [len(ids) for ids in found]
        offsets = np.cumsum([0, *lengths])
        return measure.Sequences(np.concatenate(found), offsets, np.array(lengths), 0)

    with pytest.raises(InputError, match="A text of the probe task alike contains no token"):
        prepare(task, tokenize, 64)


def test_vectors_that_are_all_the_same_have_a_correlation_of_zero_that_says_so():
    data = type("Data", (), {"scores": np.arange(30.0)})
    found = kinds.KINDS["similarity"].judge(data, {"mean": np.ones((60, 4), dtype=np.float32)})
    assert found["mean"]["spearman"] == 0.0
    assert "not defined" in found["mean"]["warnings"][0]


def test_pairs_with_a_low_score_are_left_out(tmp_path):
    task = load_task(retrieval(tmp_path, label="label", least=2.0))
    kept = [row for row in pairs() if row["label"] >= 2.0]
    assert kinds.of_task(task).read(task).relevance.queries == len({row["text1"] for row in kept})


# -- fine-tuning ------------------------------------------------------------------------------------------------------


def classes(folder: Path, n: int = 96, **task) -> str:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = [{"text": f"{sentence(rng)} {('yes', 'no')[i % 2]}", "label": i % 2} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write(folder, "tuned", [], kind="finetune", train="train.jsonl", test="test.jsonl", **task)


def test_finetuning_learns_what_one_word_says(encoder, tmp_path):
    before = {name: tensor.clone() for name, tensor in encoder.module.state_dict().items()}
    task = load_task(classes(tmp_path, lr=3e-3, epochs=6, pooling="mean", dropout=0.0))
    material = prepare(task, encoder.tokenize, 64)
    found = evaluate(encoder, material, Cache(str(tmp_path / "cache")), start="untrained")
    assert found["mean"]["test_accuracy"] > 0.9
    assert len(found["mean"]["seeds"]) == 3
    assert found["mean"]["score"] == pytest.approx(np.mean(found["mean"]["seeds"]))
    assert found["mean"]["spread"] == pytest.approx(np.std(found["mean"]["seeds"], ddof=1))
    assert found["baselines"]["majority"]["score"] == 0.5
    assert found["beyond_start"]["mean"]["p_value"] > 0
    parsed = record.parse(json.dumps({"step": 1, "run": "r", **found}).encode())
    assert comparison_table(compare(parsed, parsed)).row_count == 1
    assert result_table(parsed).row_count == 3
    assert results_table([parsed]).row_count == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.module.state_dict().items())


def test_finetuning_of_pairs_with_scores(encoder, tmp_path):
    path = similarity(tmp_path)
    task = {"train": "alike.jsonl", "test": "alike.jsonl", "text": ["text1", "text2"], "target": "scores"}
    write(tmp_path, "scored", [], kind="finetune", **task, epochs=1, lr=1e-3)
    assert load_task(path)
    material = prepare(load_task(str(tmp_path / "scored.yaml")), encoder.tokenize, 64)
    found = evaluate(encoder, material, Cache(str(tmp_path / "cache")), start="untrained")
    assert found["pooler"]["score"] == found["pooler"]["spearman"]
    assert found["beyond_start"]["pooler"]["difference"] == pytest.approx(
        found["pooler"]["score"] - found["baselines"]["untrained"]["pooler"]["score"], abs=1e-6
    )


def test_a_budget_that_ends_before_the_first_epoch_says_how_far_it_came(encoder, tmp_path):
    task = load_task(classes(tmp_path, max_seconds=1e-6))
    with pytest.raises(RunFailed, match=r"was reached after 0 of the 6 steps of the first epoch, at seed 1 of 3"):
        evaluate(encoder, prepare(task, encoder.tokenize, 64), Cache(str(tmp_path / "cache")))


def test_finetuning_has_the_losses_of_transformers_own_loop(tmp_path):
    """Ten steps of its Trainer from the same weights, head and batches, in float32 without dropout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=100, **sizes, **off, num_labels=3)
    theirs = transformers.BertForSequenceClassification(config)
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 20, 64)
    sequences = measure.Sequences(
        rng.integers(4, 100, lengths.sum()).astype(np.int32), np.cumsum([0, *lengths]), lengths.astype(np.int32), 0
    )
    targets = rng.integers(0, 3, 64)

    class Own(Encoder):
        pad_id, module = 0, BertModelOf(theirs.bert)

        def encode(self, input_ids, token_type_ids, attention_mask):
            out = self.module.model(input_ids, attention_mask, token_type_ids)
            return out.last_hidden_state, out.pooler_output

        tokenize = untrained = None

    plan = training.Plan(epochs=3, batch_size=16, lr=1e-3, warmup=0.25, pooling="pooler", dropout=0.0)
    head = training.Head(32, 3, 0.0)
    head.linear.load_state_dict(theirs.classifier.state_dict())
    own, order = Own(), np.random.default_rng(5)
    own.module = copy.deepcopy(own.module)
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "seconds": 1e9}
    losses = list(training.train(own, head, sequences, targets, plan, rng=np.random.default_rng(5), **options))
    batches: list[np.ndarray] = []
    for _ in range(3):
        epoch = order.permutation(64)
        batches += [epoch[first : first + 16] for first in range(0, 64, 16)]

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            for rows in batches:
                ids, types, mask = pad(sequences, rows, 0)
                mask = torch.ones_like(ids) if mask is None else mask.long()
                labels = torch.tensor(targets[rows])
                yield {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, "labels": labels}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        warmup_steps=3,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=theirs, args=arguments, train_dataset=Batches(), data_collator=lambda rows: rows[0]
    )
    seen: list[float] = []
    compute = trainer.compute_loss

    def noted(*args, **kwargs):
        loss = compute(*args, **kwargs)
        seen.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss

    trainer.compute_loss = noted
    trainer.train()
    assert len(losses) == 12
    assert losses[:10] == pytest.approx(seen[:10], abs=1e-5)


class BertModelOf(torch.nn.Module):
    """A module of its own, so that a deep copy shares no weight with the trainer's."""

    def __init__(self, model):
        super().__init__()
        self.model = model


# -- one model, and what it costs -------------------------------------------------------------------------------------


def test_a_probe_from_python_is_the_commands(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "local_cache", lambda: Cache(str(tmp_path / "cache")))
    model, path = encoder.module, similarity(tmp_path)
    model.train()
    raybert.save(model, str(tmp_path / "checkpoint"))
    by_uri = raybert.probe.run(str(tmp_path / "checkpoint"), path)
    by_model = raybert.probe.run(model, load_task(path), device="cpu")
    assert model.training
    model.eval()
    task = {"name": "alike", "kind": "similarity", "test": str(tmp_path / "alike.jsonl")}
    by_mapping = raybert.probe.run(model, task, device="cpu")
    assert by_uri["mean"] == by_model["mean"] == by_mapping["mean"]
    assert by_uri["checkpoint"] == str(tmp_path / "checkpoint")
    similarity(tmp_path, pairs(5))
    with pytest.raises(InputError, match="a correlation needs at least 20"):
        raybert.probe.run(model, task)


def test_a_plan_counts_texts_tokens_and_operations(encoder, tmp_path):
    config = encoder.module.config
    tasks = [load_task(similarity(tmp_path)), load_task(retrieval(tmp_path)), load_task(classes(tmp_path, epochs=2))]
    alike, found, tuned = plan.costs(tasks, config)
    lengths = prepare(tasks[0], encoder.tokenize, 64).sequences.lengths
    assert (alike.texts, alike.tokens) == (len(lengths), lengths.sum())
    layer = 2 * (4 * 32 * 32 + 2 * 32 * config.intermediate_size)
    assert alike.flops == pytest.approx(lengths.sum() * layer + 4 * 32 * (lengths**2).sum(), rel=0.02)
    assert found.flops > 0
    assert tuned.flops > found.flops > alike.flops / 2
    assert min(cost.seconds for cost in (alike, found, tuned)) > 0
    assert plan.table([alike, found, tuned]).row_count == 4
    # Once, the untrained encoder, a fine-tuned one from every seed; and a start that is not random.
    assert [cost.baseline_flops for cost in (alike, found, tuned)] == [alike.flops, found.flops, tuned.flops]
    started = plan.costs(tasks, config, begins_random=False)
    assert [cost.baseline_flops for cost in started] == [2 * cost.flops for cost in (alike, found, tuned)]
    assert min(cost.baseline_seconds / cost.seconds for cost in started) == pytest.approx(2)
    # A second task of the same file, of whose texts a few are new.
    more = load_task(
        write(tmp_path, "alike2", [], kind="similarity", test=str(tmp_path / "alike.jsonl"), max_tokens=12)
    )
    first, second, _ = plan.costs([tasks[0], tasks[1], more], config)
    assert (first.shared, second.texts) == (0, first.texts)
    assert 0 < second.shared < second.texts
    assert second.baseline_flops > second.flops, "untrained, each task is encoded alone"
    assert second.tokens == 12 * (second.texts - second.shared)
    shown = plan.table([first, second], threads=2)
    assert "with 2 threads; shared texts are encoded once; at most once per run: the baselines" in shown.caption
    short = [tasks[2].model_copy(update={"max_seconds": 1e-6})]
    (cut,) = plan.costs(short, config, begins_random=False)
    assert (cut.seconds, cut.baseline_seconds) == (1e-6, 2e-6)
    assert [plan.threads_of(cpus) for cpus in ("auto", 0.25, 2.5)] == [1, 1, 2]
    assert plan.costs([], config) == []
    assert "The run has no probe task" in plan.table([])
