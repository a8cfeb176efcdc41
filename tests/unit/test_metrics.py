"""What `checkpoint.best` and a sweep follow: names of metrics, their values in records, the weights that are kept."""

import shutil
from pathlib import Path

import pytest

from raybert import storage
from raybert.errors import InputError
from raybert.export.card import origin
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.files import load, save
from raybert.probe import metrics
from raybert.probe.service import best, queue
from raybert.probe.service.owner import Owner
from raybert.probe.service.served import Outcome, ServedRun
from raybert.probe.tasks import parse_task
from raybert.sweep.reports import probe_report
from raybert.train.recovery.repair import repair
from tests.runs import make_run, probe, score, write_probe

STS = parse_task({"name": "sts", "kind": "similarity", "test": "dev.parquet"}, "here")
TUNED = parse_task(
    {"name": "tuned", "kind": "finetune", "train": "t.csv", "test": "d.csv", "text": "a", "label": "b"}, ""
)
NAMED = parse_task({"name": "topics-1.5", "train": "t.csv", "test": "d.csv", "text": "a", "label": "b"}, "here")


def test_every_headline_has_a_name_in_all_poolings_and_in_each():
    found = metrics.names([STS, TUNED])
    alike = ["sts.spearman", "sts.pooler.spearman", "sts.cls.spearman", "sts.mean.spearman"]
    assert found == ["validation_loss", *alike, "tuned.score", "tuned.pooler.score"]
    for name in found:
        metrics.check("checkpoint.best", name, [STS, TUNED])


@pytest.mark.parametrize(
    ("name", "tasks", "sentence"),
    [
        ("sts.pearson", [STS], r"checkpoint.best=sts.pearson .* did you mean sts.spearman\?"),
        (
            "tuned.mean.score",
            [STS, TUNED],
            r"Its metrics are validation_loss and .* tuned.score, each also",
        ),
        ("sts.spearman", [], "has no probe tasks; use validation_loss, or set probe.tasks"),
    ],
)
def test_a_wrong_name_is_a_sentence(name, tasks, sentence):
    with pytest.raises(InputError, match=sentence):
        metrics.check("checkpoint.best", name, tasks)


def test_a_record_has_the_metrics_of_its_task_alone():
    record = probe("topics-1.5", 200, 1000)
    assert metrics.value("topics-1.5.test_accuracy", record) == record["mean"]["test_accuracy"]  # the highest
    assert metrics.value("topics-1.5.cls.test_accuracy", record) == record["cls"]["test_accuracy"]
    for other in ("topics-1.5.macro_f1", "topics-1.test_accuracy", "topics-1.5.last.test_accuracy", "validation_loss"):
        assert metrics.value(other, record) is None
    assert metrics.value("topics-1.5.test_accuracy", {"task": "topics-1.5", "step": 200, "status": "failed"}) is None
    unknown = {"task": "topics-1.5", "step": 200, "kind": "younger"}
    assert metrics.value("topics-1.5.test_accuracy", unknown) is None


def test_a_sweep_is_told_of_probes_between_the_start_and_the_last_step():
    metric = "topics-1.5.cls.test_accuracy"
    found = [probe_report(metric, probe("topics-1.5", step, 400), steps=400, tokens=32 * 128) for step in (0, 200, 400)]
    value = probe("topics-1.5", 200, 400)["cls"]["test_accuracy"]
    assert found == [None, {"step": 200, "tokens": 200 * 32 * 128, metric: value}, None]
    assert probe_report("sts.spearman", probe("topics-1.5", 200, 400), steps=400, tokens=1) is None


def model(step: int) -> Bert:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    found = Bert(config)
    found.pooler.bias.data.fill_(step)
    return found


def kept(run: str) -> int:
    return int(load(f"{run}/checkpoints/best").pooler.bias[0])


def test_the_weights_of_the_highest_headline_are_kept_whatever_is_killed_in_between(tmp_path):
    run = make_run(tmp_path, name="run", steps=500, validation_every=0, probe_every=0, tasks=())
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("best: validation_loss", "best: topics-1.5.test_accuracy"))

    def probed(step: int, accuracy: float, metric: str = "topics-1.5.test_accuracy") -> queue.Entry:
        save(model(step), queue.weights_uri(run, step))
        queue.add(queue.Request(run, step, (NAMED,), positions=32, cpus=1, max_waiting=5, best=metric))
        write_probe(run, probe("topics-1.5", step, 500) | dict.fromkeys(("pooler", "cls", "mean"), score(accuracy)))
        entry = queue.read_entry(run, step)
        best.keep(entry)
        return entry

    probed(0, 0.99)
    assert not storage.exists(f"{run}/checkpoints/best"), "the start was kept"
    probed(100, 0.6)
    assert kept(run) == 100
    second = probed(200, 0.8)
    probed(300, 0.7)
    probed(400, 0.8)
    assert kept(run) == 200, "a later step that is no better replaced it"
    # A service that was killed after it had copied the weights does so again, unless it had begun to remove them.
    storage.remove(f"{run}/probes/best.json")
    best.keep(second)
    assert kept(run) == 200
    storage.remove(f"{run}/probes/best.json")
    storage.remove(f"{second.weights}/config.json")
    best.keep(second)
    assert kept(run) == 200
    probed(500, 0.9)
    assert kept(run) == 500
    found = origin(f"{run}/checkpoints/best")
    assert (found.step, found.best) == (500, "the highest topics-1.5.test_accuracy")
    probed(600, 0.95, metric="")  # a run that keeps the best by validation loss, or none
    assert kept(run) == 500
    # A run that goes on with another metric; what was asked for before says nothing of it.
    other = "topics-1.5.cls.test_accuracy"
    config.write_text(config.read_text().replace("best: topics-1.5.test_accuracy", f"best: {other}"))
    probed(700, 0.99)
    assert kept(run) == 500
    probed(800, 0.2, metric=other)
    assert kept(run) == 800
    found = origin(f"{run}/checkpoints/best")
    assert (found.step, found.best) == (800, f"the highest {other}")
    (tmp_path / "run" / "probes" / "weights" / "step-00000800" / "trained").mkdir(exist_ok=True)
    assert best.forget(run)
    assert not best.forget(run)


def test_a_run_that_is_started_again_leaves_a_copy_alone_that_is_under_way(tmp_path, monkeypatch):
    run = make_run(tmp_path, name="run", steps=500, validation_every=0, probe_every=0, tasks=())
    save(model(3), f"{run}/checkpoints/best")
    target = f"{run}/checkpoints/best"
    weights = queue.weights_uri(run, 100)
    save(model(100), weights)
    (Path(weights) / ".best-killed").mkdir()
    copied, copy = [], shutil.copyfile

    def copyfile(source, place):
        (tmp_path / "run" / "checkpoints" / ".best-killed").mkdir()  # by a trainer, which is no more
        repair(run)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["best"]
        assert kept(run) == 3
        copied.append(place)
        return copy(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copyfile)
        best._copy(weights, target)
    assert len(copied) == 2
    assert kept(run) == 100
    assert sorted(path.name for path in Path(target).iterdir()) == ["SHA256SUMS", "config.json", "model.safetensors"]
    # What a service has left that was killed is gone with the weights.
    queue.add(queue.Request(run, 100, (NAMED,), positions=32, cpus=1, max_waiting=5))
    queue.finish(queue.read_entry(run, 100))
    assert not Path(weights).exists()


def test_the_best_is_kept_as_soon_as_its_own_task_is_judged(tmp_path):
    """Another task of the entry may be a fine-tuning that takes hours."""
    run = make_run(tmp_path, name="run", steps=500, validation_every=0, probe_every=0, tasks=())
    metric = "topics-1.5.test_accuracy"
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("best: validation_loss", f"best: {metric}"))
    save(model(100), queue.weights_uri(run, 100))
    queue.add(queue.Request(run, 100, (TUNED, NAMED), positions=32, cpus=1, max_waiting=5, best=metric))
    served = ServedRun(run, Owner("me", "here"))
    served.advance()
    found = dict.fromkeys(("pooler", "cls", "mean"), score(0.6))
    served.outcome, served.next = Outcome(served.next, values={"started": 0.0, **found}), None
    storage.write_bytes(f"{run}/checkpoints", b"")  # no place for a directory
    for _ in range(2):
        with pytest.raises(OSError, match="checkpoints"):
            served.advance()
    assert served.due, "it is not tried again"
    storage.remove(f"{run}/checkpoints")
    served.advance()
    assert [record["task"] for record in served.news] == ["topics-1.5"], "told again at each try"
    assert served.next.task == TUNED
    assert kept(run) == 100
    assert best.read(run, metric) == (100, 0.6)
