"""Fine-tuning: budgets, baselines that have none, seeds in processes of their own, and what is not defined."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from raybert.encode.encoders import RaybertEncoder
from raybert.errors import RunFailed
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.probe import evaluate as evaluation
from raybert.probe import kinds, measure, record, training
from raybert.probe.baselines import Cache
from raybert.probe.evaluate import evaluate, evaluate_all, prepare
from raybert.probe.kind import pack_floats
from raybert.probe.service import work
from raybert.probe.show import format_block, result_table, results_table
from raybert.probe.tasks import load_task
from raybert.report.page import _baselines
from raybert.report.read import _probe
from raybert.report.trackers import probe_figures
from tests.unit.test_probe_kinds import classes, similarity, write

FINETUNE = kinds.KINDS["finetune"]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(3)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=64)
    return RaybertEncoder(Bert(config).eval())


def small(folder, **settings):
    """Four steps an epoch, twelve in all."""
    return load_task(classes(folder, 32, batch_size=8, **settings))


class Clock:
    """A look at it takes so many seconds, so that what a budget allows does not depend on the machine."""

    def __init__(self) -> None:
        self.now, self.rate = 0.0, 1.0

    def monotonic(self) -> float:
        self.now += self.rate
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(training, "time", found)
    return found


@pytest.fixture
def slow_untrained(clock, monkeypatch):
    """`slow_untrained(rate)`: from then on the untrained encoder is trained by a clock of this rate."""
    train = evaluation._train_untrained

    def set_rate(rate: float) -> None:
        def slow(*args):
            clock.rate = rate
            try:
                return train(*args)
            finally:
                clock.rate = 1.0

        monkeypatch.setattr(evaluation, "_train_untrained", slow)

    return set_rate


def test_a_baseline_that_ran_out_of_its_budget_is_absent_and_no_cut_one_is_kept(encoder, tmp_path, slow_untrained):
    task = small(tmp_path, max_seconds=75)  # 25 seconds a seed
    material, cache = prepare(task, encoder.tokenize, 64), Cache(str(tmp_path / "cache"))
    slow_untrained(10.0)
    found = {"step": 5, "run": "r", "status": "done", **evaluate(encoder, material, cache, start="untrained")}
    reason = (
        "The time limit max_seconds=75 was reached after 2 of the 4 steps of the first epoch, at seed 1 of 3; "
        "raise it, or lower n_train."
    )
    assert len(found["pooler"]["seeds"]) == 3
    assert "warnings" not in found["pooler"]
    assert found["baselines"]["untrained"] == found["baselines"]["start"] == {"absent": reason}
    assert "beyond_start" not in found
    parsed = record.parse(json.dumps(found, allow_nan=False).encode())
    block = format_block(parsed)
    assert f"untrained absent ({reason})" in block
    assert f"start absent ({reason})" in block
    assert result_table(parsed).row_count == 3  # its own, the untrained encoder, and the majority class
    assert results_table([parsed]).row_count == 1
    assert set(probe_figures(parsed)) == {"probe/tuned/pooler", "probe/tuned/majority"}
    assert f"no untrained encoder ({reason})" in _baselines(_probe("tuned", 5, FINETUNE, parsed), "pooler")
    slow_untrained(2.5)
    cut = evaluate(encoder, material, cache)["baselines"]["untrained"]["pooler"]
    assert cut["warnings"][0] == "seed 0 stopped after 10 of 12 steps, at its time limit"
    slow_untrained(1.0)
    whole = evaluate(encoder, material, cache)["baselines"]["untrained"]["pooler"]
    assert "warnings" not in whole
    slow_untrained(10.0)
    assert evaluate(encoder, material, cache)["baselines"]["untrained"]["pooler"] == whole


def test_within_a_run_a_baseline_that_its_budget_cut_is_not_trained_again(
    encoder, tmp_path, monkeypatch, slow_untrained
):
    task = small(tmp_path, max_seconds=75)
    material, cache = prepare(task, encoder.tokenize, 64), Cache(str(tmp_path / "cache"))
    for run, rate, trained in (("absent", 10.0, 1), ("cut", 2.5, 3)):
        slow_untrained(rate)
        counted = Mock(side_effect=evaluation._train_untrained)
        monkeypatch.setattr(evaluation, "_train_untrained", counted)
        options = {"starts": ["untrained"], "of_run": Cache(str(tmp_path / run))}
        first, again = (evaluate_all(encoder, [material], cache, **options)[0]["baselines"] for _ in range(2))
        assert counted.call_count == trained
        assert first == again
    assert again["start"]["pooler"]["warnings"][0] == "seed 0 stopped after 10 of 12 steps, at its time limit"
    slow_untrained(1.0)
    (other,) = evaluate_all(encoder, [material], cache, starts=[None], of_run=Cache(str(tmp_path / "another")))
    assert "warnings" not in other["baselines"]["untrained"]["pooler"]
    # What is whole is everybody's.
    (once_more,) = evaluate_all(encoder, [material], cache, starts=[None], of_run=Cache(str(tmp_path / "absent")))
    assert once_more["baselines"]["untrained"] == other["baselines"]["untrained"]


def test_a_start_that_ran_out_of_its_budget_is_absent_with_its_reason():
    found = {"kind": "finetune", "texts": "t", "baselines": {}}
    evaluation.add_start(found, {"step": 0, "status": "failed", "reason": "RunFailed: The budget was over."})
    assert found["baselines"]["start"] == {"absent": "RunFailed: The budget was over."}


def test_each_seed_has_a_third_of_the_budget(encoder, tmp_path, clock):
    material = prepare(small(tmp_path, max_seconds=24), encoder.tokenize, 64)
    told: list[float] = []
    found = measure.train(encoder, material, 1, progress=told.append)
    assert (found["steps"], found["planned"]) == (8, 12)
    assert told == pytest.approx([(1 + step / 12) / 3 for step in range(1, 9)])
    assert FINETUNE.cut_short(found)


def test_seeds_that_were_trained_elsewhere_give_the_same_record(encoder, tmp_path):
    material, cache = prepare(small(tmp_path, epochs=1), encoder.tokenize, 64), Cache(str(tmp_path / "cache"))
    here = evaluate(encoder, material, cache)
    # Through storage, as JSON.
    trained = [json.loads(json.dumps(measure.train(encoder, material, number))) for number in range(3)]
    (joined,) = evaluate_all(encoder, [material], cache, starts=[None], trained=trained)
    assert joined["seconds"] > sum(each["seconds"] for each in trained)
    assert {**joined, "seconds": 0} == {**here, "seconds": 0}


def test_a_prediction_that_is_the_same_for_all_texts_counts_as_0_and_says_so(encoder, tmp_path):
    similarity(tmp_path)
    files = {"train": "alike.jsonl", "test": "alike.jsonl", "text": ["text1", "text2"], "target": "scores"}
    data = FINETUNE.read(load_task(write(tmp_path, "scored", [], kind="finetune", **files)))
    rising = data.targets[data.n_train :]
    outputs = [rising, np.full(len(rising), 0.3), rising]
    trained = [{"outputs": pack_floats(out), "steps": 1, "planned": 1} for out in outputs]
    found = FINETUNE.join(data, trained)
    assert found["pooler"]["seeds"] == pytest.approx([1.0, 0.0, 1.0])
    (warning,) = found["pooler"]["warnings"]
    assert warning.startswith("seed 1 predicts the same score for all texts, so its Spearman's correlation is not")
    assert "NaN" not in json.dumps(found)


def test_a_training_that_diverged_is_no_result(encoder, tmp_path, monkeypatch):
    material = prepare(small(tmp_path, epochs=1), encoder.tokenize, 64)
    monkeypatch.setattr(training, "predict", lambda *_, **__: np.full((96, 2), np.nan, dtype=np.float32))
    with pytest.raises(RunFailed, match=r"Fine-tuning with lr=5e-05 diverged at seed 1 of 3"):
        measure.measure(encoder, [material])


def test_no_more_seeds_run_at_a_time_than_there_are_workers(monkeypatch, tmp_path):
    """Each but the first ones waits for the one that stands so many places before it."""
    started: list[tuple] = []

    def remote(name):
        def start(*args):
            started.append((name, args))
            return f"{name}{len(started)}"

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    monkeypatch.setattr(work, "_train", remote("train"))
    monkeypatch.setattr(work, "_probe", remote("probe"))
    for workers, waits_for in ((1, [(), ("train1",), ("train2",)]), (2, [(), (), ("train1",)]), (3, [(), (), ()])):
        started.clear()
        entry = SimpleNamespace(cpus=1.0, gpus=0.0, workers=workers)
        work.probe(entry, load_task(classes(tmp_path)), ["texts"], "cache", "service")
        *trainings, (_, last) = started
        assert [args[4:] for _, args in trainings] == waits_for
        assert last[4:] == ("texts", "train1", "train2", "train3")


def test_a_seed_whose_process_ended_is_tried_again():
    """What waits for a seed raises the end of the seed's process in a wrapping; what a seed's code raised is final."""
    for cause in (WorkerCrashedError(), NodeDiedError("gone"), OutOfMemoryError("killed")):
        wrapped = RayTaskError("_probe", "trace", cause).as_instanceof_cause()
        assert work.try_again(wrapped, 1)
    assert "ran out of memory" in work.reason(wrapped, 4)
    own = RayTaskError("_probe", "trace", RunFailed("The budget was over.")).as_instanceof_cause()
    assert not work.try_again(own, 1)
    assert work.reason(own, 1) == "RunFailed: The budget was over."
