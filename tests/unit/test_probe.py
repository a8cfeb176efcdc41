"""The probe's parts: tasks, texts, intervals, the classifier against scikit-learn, the queue's laws."""

import io
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from raybert import storage
from raybert.cli import run_app
from raybert.config import from_mapping
from raybert.encode import POOLINGS
from raybert.encode.encoders import RaybertEncoder, open_encoder, tokenize
from raybert.encode.vectors import batches, embed
from raybert.errors import InputError
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.files import save
from raybert.probe import classify, tables
from raybert.probe.baselines import Cache
from raybert.probe.classification import ClassificationTask, pack_bits, unpack_bits
from raybert.probe.compare import compare
from raybert.probe.evaluate import evaluate, prepare
from raybert.probe.kind import Whole
from raybert.probe.service import owner, queue
from raybert.probe.service.owner import Owner
from raybert.probe.service.served import Outcome, ServedRun
from raybert.probe.show import format_block, result_table, results_table
from raybert.probe.statistics import paired_bootstrap, wilson
from raybert.probe.tasks import load_task, parse_task, passed_over
from raybert.probe.texts import load_texts
from raybert.tokenizer import CLS_ID, PAD_ID, SEP_ID
from raybert.train import checkpoint
from raybert.train.checkpoint import Snapshot
from raybert.train.recovery import faults
from raybert.train.saver import Saver
from tests.tasks import make_task

CONFIG = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(3)
    return RaybertEncoder(Bert(CONFIG))


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_holds_the_share_and_stays_inside(n, share):
    k = round(share * n)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert high - low <= 1


def test_wilson_agrees_with_scipy():
    from scipy.stats import binomtest

    found = binomtest(37, 120).proportion_ci(method="wilson")
    assert wilson(37, 120) == pytest.approx((found.low, found.high))


def test_the_bootstrap_sees_a_difference_and_sees_none():
    rng = np.random.default_rng(1)
    a = rng.random(2000) < 0.6
    assert paired_bootstrap(a, a).difference == 0
    assert paired_bootstrap(a, a).p_value == 1
    better = a | (rng.random(2000) < 0.1)
    found = paired_bootstrap(a, better)
    assert found.interval[0] > 0
    assert found.p_value < 0.01
    assert found.difference == pytest.approx(better.mean() - a.mean())


def test_the_classifier_is_scikit_learns():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 5)), rng.integers(0, 3, 200)
    reference = LogisticRegression(max_iter=1000, random_state=42).fit(x[:150], y[:150])
    score = classify.fit(x[:150], y[:150], x[150:], y[150:])
    assert score.test_accuracy == reference.score(x[150:], y[150:])
    assert score.train_accuracy == reference.score(x[:150], y[:150])
    assert np.array(score.confusion).sum() == 50


def test_a_classifier_that_does_not_converge_says_so(monkeypatch):
    monkeypatch.setattr(classify, "MAX_ITER", 1)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 5)), rng.integers(0, 2, 100)
    score = classify.fit(x, y, x, y)
    assert not score.converged
    assert score.warnings


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80), budget=st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths)
    found = list(batches(lengths, budget))
    assert sorted(np.concatenate(found)) == list(range(len(lengths)))
    assert all(len(rows) == 1 or lengths[rows].max() * len(rows) <= budget for rows in found)


def test_vectors_do_not_depend_on_the_batches(encoder):
    sequences = tokenize(["a b c", "one two three four five six", "x", "the end of it all"], 32)
    one = embed(encoder, sequences, dtype="float32", batch_tokens=1)
    all_ = embed(encoder, sequences, dtype="float32")
    for name in POOLINGS:
        np.testing.assert_allclose(one[name], all_[name], rtol=1e-4, atol=1e-5)


def test_sequences_are_cls_text_sep_and_pairs_are_cut_fairly():
    single = tokenize(["hello world"], 64)
    assert single.ids[0] == CLS_ID
    assert single.ids[-1] == SEP_ID
    pair = tokenize([("short", "long " * 100)], 32)
    assert len(pair.ids) == 32
    assert (pair.ids == SEP_ID).sum() == 2
    assert pair.truncated == 1
    assert PAD_ID not in pair.ids


def test_a_task_is_a_file_and_its_result_has_everything_beside_it(task_file, encoder, tmp_path):
    task = load_task(task_file)
    material = prepare(task, encoder.tokenize, encoder.positions)
    cache = Cache(str(tmp_path / "cache"))
    record = evaluate(encoder, material, cache)
    assert (record["n_train"], record["n_test"], record["labels"]) == (120, 60, ["money", "sport"])
    assert record["baselines"]["tfidf"]["test_accuracy"] == 1.0
    assert record["baselines"]["majority"]["test_accuracy"] == 0.5
    assert set(record["baselines"]["untrained"]) == set(POOLINGS)
    json.dumps(record, allow_nan=False)
    again = evaluate(encoder, material, cache)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in record.items() if k != "seconds"}
    block = format_block({**record, "step": 1000, "status": "done", "title": "AG News"})
    assert block.startswith("Step 1000 AG News Embedding Evaluation:\n  Train Accuracy: ")
    named = [{**record, "checkpoint": name} for name in "ab"]
    assert compare(*named)["pooler"]["difference"] == 0
    with pytest.raises(InputError, match="different texts"):
        compare(named[0], {**named[1], "texts": "other"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labell": "topic"}, "Did you mean label"),
        ({"label": "topics"}, "has no column topics"),
        ({"train": "/nowhere.csv"}, "There is no file"),
    ],
)
def test_a_bad_task_is_a_sentence(task_file, tmp_path, change, sentence):
    import yaml

    tree = yaml.safe_load(open(task_file).read()) | change  # noqa: SIM115
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match=sentence):
        load_task(str(tmp_path / "t.yaml"))


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(InputError, match="did you mean ag_news"):
        load_task("agnews")


def test_hidden_copies_of_a_task_s_files_are_not_read_whatever_the_directory_is_called(tmp_path):
    folder = tmp_path / "My data [1-of-2]"
    for hidden in (".ipynb_checkpoints", "_temporary/0"):
        (folder / hidden).mkdir(parents=True)
        for name in ("ag_news_train-00000-of-00002.csv", "ag_news_test.csv", "texts.csv"):
            (folder / hidden / name).write_text("text,label\nhidden,9\n")
    for part in range(2):
        (folder / f"ag_news_train-0000{part}-of-00002.csv").write_text(f"text,label\ntext {part},{part}\n")
    (folder / "ag_news_test.CSV").write_text("text,label\na test,0\n")
    task = load_task(f"ag_news@{folder}")
    assert [row.values for row in tables.rows(task.train, ["text", "label"])] == [("text 0", "0"), ("text 1", "1")]
    assert [row.values for row in tables.rows(task.test, ["text", "label"])] == [("a test", "0")]
    assert len(list(tables.rows(str(folder), ["text"]))) == 3


def test_files_that_a_task_passes_over_are_named_as_prepare_names_them(task_file, tmp_path, monkeypatch, capsys):
    checkpoint, folder = str(tmp_path / "checkpoint"), tmp_path / "texts"
    save(Bert(CONFIG), checkpoint)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        shutil.copy(Path(task_file).parent / f"{split}.csv", folder / split / "a.CSV")
    (tmp_path / "t.yaml").write_text("{name: t, train: texts/train, test: texts/test/*, text: headline, label: topic}")
    task = load_task(str(tmp_path / "t.yaml"))
    assert passed_over(task) == passed_over(load_task("bbc_news")) == ""
    (folder / "train" / "_SUCCESS").touch()
    for name in ("README.md", "b.csv.gz"):
        (folder / "train" / name).touch()
    (folder / "test" / "notes.txt").touch()
    line = "skipped: 3 of other kinds (README.md, b.csv.gz, notes.txt), 1 hidden (_SUCCESS)"
    assert passed_over(task) == line
    assert load_texts(task).n_train == 120
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache of baselines
    command = ["probe", "compare", checkpoint, checkpoint, "--task", str(tmp_path / "t.yaml"), "--json"]
    assert run_app(command) == 0
    assert capsys.readouterr().err.count(line) == 1
    (folder / "train" / "a.CSV").unlink()
    with pytest.raises(
        InputError,
        match=r"contains no file that a probe task can read \(\.parquet .*; skipped: 2 of other kinds",
    ):
        load_task(str(tmp_path / "t.yaml"))


def test_a_mark_at_the_start_and_floats_for_classes_are_read(tmp_path):
    lines = "".join(f"word{i},{i % 2}.0\n" for i in range(8))
    (tmp_path / "train.csv").write_text(f"text,label\n{lines}", encoding="utf-8-sig")
    rows = [json.dumps({"text": f"other {i}", "label": i % 2}) for i in range(4)]
    (tmp_path / "test.jsonl").write_text("\n".join(rows), encoding="utf-8-sig")
    (tmp_path / "t.yaml").write_text("{name: t, train: train.csv, test: test.jsonl, label_names: [low, high]}")
    texts = load_texts(load_task(str(tmp_path / "t.yaml")))
    assert texts.names == ["low", "high"]
    assert texts.labels.tolist() == [0, 1] * 6


def test_texts_without_words_have_no_word_counts_beside_them(encoder, tmp_path):
    rows = [json.dumps({"text": "+ - " * (1 + i % 3), "label": i % 2}) for i in range(24)]
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    task = ClassificationTask(name="t", train=str(tmp_path / "all.jsonl"), test=str(tmp_path / "all.jsonl"))
    record = evaluate(encoder, prepare(task, encoder.tokenize, 32), Cache(str(tmp_path / "cache")))
    assert "no word" in record["baselines"]["tfidf"]["absent"]
    record |= {"step": 10, "status": "done"}
    assert "TF-IDF absent" in format_block(record)
    for table in (results_table([record]), result_table(record)):
        console = Console(file=io.StringIO(), width=200)
        console.print(table)
        assert "absent" in console.file.getvalue()


def test_a_directory_without_a_pooler_gives_the_same_numbers_and_a_warning(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\n")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    one, two = open_encoder(str(tmp_path)), open_encoder(str(tmp_path))
    assert "random" in one.warnings["pooler"]
    sequences = one.tokenize(["a b", "c a b"], 8)
    np.testing.assert_array_equal(embed(one, sequences)["pooler"], embed(two, sequences)["pooler"])


def test_classes_unseen_in_training_are_named(tmp_path):
    for split, labels in (("train", "abab"), ("test", "abz")):
        rows = [json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    task = ClassificationTask(name="t", train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    with pytest.raises(InputError, match="z"):
        load_texts(task)


def test_ag_news_is_the_first_texts_of_the_files(shared_data):
    task = load_task(f"ag_news@{shared_data}/ag_news")
    texts = load_texts(task)
    assert (texts.n_train, texts.n_test) == (10_000, 2_500)
    assert texts.names == ["World", "Sports", "Business", "Sci/Tech"]
    assert np.bincount(texts.labels[:10_000]).tolist() == [2491, 2544, 2523, 2442]


def test_bbc_news_comes_with_a_package_and_no_text_is_on_both_sides():
    texts = load_texts(load_task("bbc_news"))
    train, test = texts.split(texts.texts)
    assert (len(train), len(test)) == (1500, 600)
    assert not set(train) & set(test)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_survive(flags):
    assert unpack_bits(pack_bits(np.array(flags)), len(flags)).tolist() == flags


def request(run, step, *tasks):
    return queue.Request(run, step, tasks, positions=32, cpus=1, max_waiting=5)


def test_a_step_is_queued_once_and_leaves_nothing_behind(task_file, tmp_path):
    run, task = str(tmp_path / "run"), load_task(task_file)
    written = []

    def add(*tasks):
        wanted = request(run, 200, *tasks)
        if queue.new_tasks(wanted):
            written.append(wanted.weights)
        return queue.add(wanted)

    assert add(task)
    assert add(task)
    assert len(written) == 1
    assert queue.waiting_steps(run) == [200]
    assert queue.read_entry(run, 200).tasks == (task,)
    other = task.model_copy(update={"name": "other"})
    assert add(task, other)  # the run goes on with one task more
    entry = queue.read_entry(run, 200)
    assert entry.tasks == (task, other)
    queue.write_record(entry, "mine", "done", {})
    assert queue.write_record(entry, "mine", "failed", {"reason": "too late"})["status"] == "done"
    queue.write_record(entry, "other", "failed", {"reason": "test"})
    assert queue.open_tasks(entry) == []
    queue.finish(entry)
    assert queue.waiting_steps(run) == []
    assert not add(task, other)  # a resumed run comes by again
    assert list(queue.records(run)) == ["mine-00000200.json", "other-00000200.json"]
    assert list(queue.records(run, {"mine-00000200.json"})) == ["other-00000200.json"]


def test_what_cannot_be_queued_is_recorded_and_what_is_queued_is_not(task_file, tmp_path):
    run, task = str(tmp_path / "run"), load_task(task_file)
    queue.skip(run, 1, [task], "no room")
    (record,) = queue.records(run).values()
    assert (record["status"], record["reason"]) == ("skipped", "no room")
    queue.add(request(run, 2, task))
    queue.skip(run, 2, [task], "no room")
    assert len(queue.records(run)) == 1


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b'{"step": 1, "tas', ["unreadable"]),
        (b'{"tasks": [{"name": "a", "colour": 1}, {"name": "b"}]}', ["a", "b"]),
        (b'{"tasks": [{"name": "../../b"}]}', ["unreadable"]),
    ],
)
def test_an_unreadable_entry_ends_with_a_record(tmp_path, content, names):
    run = str(tmp_path)
    storage.write_bytes(queue.queue_uri(run, 1), content)
    storage.write_bytes(f"{queue.weights_uri(run, 1)}/model.safetensors", b"x")
    served = ServedRun(run, Owner("me", "here"))
    served.advance()
    assert [record["task"] for record in queue.records(run).values()] == names
    assert {record["status"] for record in served.news} == {"failed"}
    assert queue.waiting_steps(run) == []
    assert storage.list_dir(f"{run}/probes/weights") == []


def served_run(run, task, steps=(1,)):
    for step in steps:
        queue.add(request(run, step, task))
    served = ServedRun(run, Owner("me", "here"))
    served.advance()
    return served


def finish_probe(served, **outcome):
    """As the service does when a probe ends."""
    probe, served.next = served.next, None
    served.outcome = Outcome(probe, **outcome)
    served.advance()


def test_a_result_that_cannot_be_written_is_kept(task_file, tmp_path, monkeypatch):
    served = served_run(str(tmp_path), load_task(task_file))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", Mock(side_effect=OSError("away")))
        with pytest.raises(OSError, match="away"):
            finish_probe(served, values={"started": 0.0, "seconds": 1.0})
    assert served.outcome is not None
    assert served.due
    served.advance()
    assert served.next is None
    assert [record["seconds"] for record in queue.records(str(tmp_path)).values()] == [1.0]
    assert queue.waiting_steps(str(tmp_path)) == []


def test_a_lost_node_is_no_failure_and_memory_kills_end(task_file, tmp_path):
    served = served_run(str(tmp_path), load_task(task_file))
    for error in [NodeDiedError("preempted")] * 10 + [WorkerCrashedError()] * 10:
        finish_probe(served, error=error)
        assert served.next is not None
        assert not served.due
        assert served.not_before > time.monotonic()
    finish_probe(served, error=OutOfMemoryError("killed"))
    (record,) = queue.records(str(tmp_path)).values()
    assert record["status"] == "failed"
    assert "ran out of memory" in record["reason"]


def test_a_run_that_another_service_has_taken_is_let_go(task_file, tmp_path):
    run = str(tmp_path)
    served = served_run(run, load_task(task_file))
    assert owner.is_served(run)
    owner.claim(run, Owner("me", "another cluster"))
    finish_probe(served, values={"started": 0.0})
    assert served.gone
    assert queue.records(run) == {}
    assert queue.waiting_steps(run) == [1]
    owner.release(run, Owner("me", "here"))
    assert owner.is_served(run)
    owner.release(run, Owner("me", "another cluster"))
    assert not owner.is_served(run)


def test_a_task_that_comes_while_an_entry_ends_is_done_as_well(task_file, tmp_path):
    run, task = str(tmp_path), load_task(task_file)
    served = served_run(run, task)
    other = task.model_copy(update={"name": "other"})
    queue.add(request(run, 1, task, other))
    finish_probe(served, values={"started": 0.0})
    served.advance()
    assert served.next.task == other


def test_tasks_that_read_a_common_file_share_a_pass_until_one_fails(task_file, tmp_path):
    run, task = str(tmp_path), load_task(task_file)
    tuned = parse_task(task.model_dump(exclude={"kind"}) | {"kind": "finetune", "name": "tuned"}, "here")
    queue.add(request(run, 1, tuned, task, task.model_copy(update={"name": "other"})))
    queue.add(request(run, 2, task))
    served = ServedRun(run, Owner("me", "here"))
    served.advance()
    assert (served.next.task.name, [other.name for other, _ in served.next.beside]) == ("mine", ["other"])
    assert set(served.texts) == {"mine", "other"}
    finish_probe(served, error=NodeDiedError("preempted"))
    assert (served.next.task.name, served.next.beside) == ("mine", ())
    assert served.not_before > time.monotonic()  # as after any other failure
    finish_probe(served, values={"started": 0.0})
    assert (served.next.task.name, served.next.beside) == ("other", ())
    finish_probe(served, values={"started": 0.0})
    assert (served.next.entry.step, served.next.task.name) == (2, "mine")
    finish_probe(served, values={"started": 0.0, "beside": {}})
    assert (served.next.entry.step, served.next.task.name) == (1, "tuned")  # when nothing else waits
    finish_probe(served, values={"started": 0.0})
    assert served.next is None
    assert queue.waiting_steps(run) == []


def test_a_service_that_ended_between_encoding_and_judging_leaves_nothing_half_done(
    task_file, encoder, tmp_path, monkeypatch
):
    run, task = str(tmp_path / "run"), load_task(task_file)
    material, cache = prepare(task, encoder.tokenize, 32), Cache(str(tmp_path / "cache"))
    before = served_run(run, task)
    probe, before.next, before.running = before.next, None, before.next
    with monkeypatch.context() as patch:
        patch.setattr(Whole, "finish", Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            evaluate(encoder, material, cache)
    assert storage.list_dir(str(tmp_path / "cache")) == []
    assert queue.records(run) == {}
    # The next service finds the same probe, which then has the result of one that nothing disturbed.
    after = ServedRun(run, Owner("me", "here"))
    after.advance()
    assert (after.next.entry, after.next.task, after.next.key) == (probe.entry, probe.task, probe.key)
    found = evaluate(encoder, material, cache)
    undisturbed = evaluate(encoder, material, Cache(str(tmp_path / "other")))
    assert {**found, "seconds": 0} == {**undisturbed, "seconds": 0}
    finish_probe(after, values={"started": 0.0, **found})
    (record,) = queue.records(run).values()
    assert record["pooler"] == found["pooler"]
    assert queue.waiting_steps(run) == []


def test_texts_that_change_are_read_again(task_file, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(Path(task_file).parent, folder)
    text = Path(task_file).read_text().replace(f"{Path(task_file).parent}/", "")  # paths beside the YAML
    (folder / "mine.yaml").write_text(text)
    task = load_task(str(folder / "mine.yaml"))
    assert task.train == f"{folder}/train.csv"
    served = served_run(str(tmp_path), task, steps=(1, 2))
    before = served.next.key
    finish_probe(served, values={"started": 0.0})
    assert served.next.key == before
    with open(folder / "train.csv", "a") as file:
        file.write("\nanother goal,sport")
    served.next = None
    served.advance()
    assert served.next.key != before
    assert served.texts == {"mine": served.next.key}


def test_a_request_keeps_its_workers_and_one_without_any_is_refused(task_file, tmp_path):
    run, task = str(tmp_path), load_task(task_file)
    for step, workers in ((1, 3), (2, 0)):
        queue.add(replace(request(run, step, task), workers=workers))
    assert queue.read_entry(run, 1).workers == 3
    with pytest.raises(InputError, match="out of range"):
        queue.read_entry(run, 2)
    older = json.loads(Path(queue.queue_uri(run, 1)).read_text())
    del older["workers"]
    Path(queue.queue_uri(run, 1)).write_text(json.dumps(older))
    assert queue.read_entry(run, 1).workers == 1


def test_a_planted_queue_entry_is_refused(tmp_path):
    run = str(tmp_path)
    storage.write_bytes(queue.queue_uri(run, 1), b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    with pytest.raises(InputError, match="not a probe queue entry"):
        queue.read_entry(run, 1)


def test_trouble_with_a_probe_does_not_end_training(task_file, tmp_path, monkeypatch):
    saver = Saver.__new__(Saver)  # without the Ray Train worker that it lives in
    saver.config = from_mapping({"run": {"name": "run", "storage": str(tmp_path)}})
    storage.write_bytes(f"{saver.config.run_uri}/config.yaml", b"{}")
    saver.tasks, saver.probe_cpus = [load_task(task_file)], 1.0
    monkeypatch.setattr(checkpoint, "write", Mock(side_effect=ValueError("no place for the weights")))
    saver._request_probe(Snapshot({}, BertConfig(), None), 5)
    (record,) = queue.records(saver.config.run_uri).values()
    assert (record["status"], record["step"]) == ("skipped", 5)
    assert "no place for the weights" in record["reason"]
    assert [fault["kind"] for fault in faults.read_faults(saver.config.run_uri)[0]] == ["probe"]
