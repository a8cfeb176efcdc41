"""One watcher, many subscribers: each is told everything, whatever the others do."""

import json
import logging
import random
import threading
from pathlib import Path

import pytest

from raybert.report import watch
from raybert.report.watch import RunReader, Subscriber, watching
from raybert.train.recovery import faults
from tests.runs import make_run, probe, record, write_probe


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "LOCAL_SECONDS", 0.01)
    return make_run(tmp_path, steps=100, done=60, log_every=10, validation_every=30, probe_every=30)


def log(run, *steps):
    with Path(run, "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps(record(step, 100, random.Random(step))) + "\n")


class Listener:
    """Collects the steps, probes and faults that it is told of."""

    def __init__(self, *, history=False):
        self.steps, self.probes, self.faults = [], [], []
        self.looked = threading.Event()
        self.subscriber = Subscriber(
            "listener",
            on_record=lambda record: self.steps.append(record["step"]),
            on_probe=lambda record: self.probes.append((record["task"], record["step"])),
            on_fault=lambda fault: self.faults.append(fault["text"]),
            on_look=self.looked.set,
            history=history,
        )


def test_each_is_told_what_is_new_and_who_asks_what_was_there_before(run):
    faults.note(run, "restart", "before")
    new, every = Listener(), Listener(history=True)
    with watching(run, [new.subscriber, every.subscriber]):
        log(run, 70)
        assert new.looked.wait(60)
        write_probe(run, probe("bbc_news", 90, 100))
        write_probe(run, probe("bbc_news", 70, 100))
        faults.note(run, "restart", "meanwhile")
        log(run, 80)
    assert new.steps == [70, 80]
    assert sorted(new.probes) == [("bbc_news", 70), ("bbc_news", 90)]
    assert new.faults == ["meanwhile"]
    assert every.steps == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert sorted(every.probes) == [("bbc_news", step) for step in (30, 60, 70, 90)]
    assert every.faults == ["before", "meanwhile"]


def test_the_end_tells_what_no_look_has_seen(run, monkeypatch):
    monkeypatch.setattr(watch, "LOCAL_SECONDS", 3600)
    listener = Listener()

    def fail():
        with watching(run, [listener.subscriber]):
            log(run, 70)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert listener.steps == [70]


def test_one_that_raises_loses_that_news_alone_and_harms_no_other(run, caplog):
    told, listener = [], Listener()

    def weak(record):
        told.append(record["step"])
        if record["step"] < 90:
            raise ValueError("no room")

    weak_one = Subscriber("weak one", on_record=weak, on_look=lambda: 1 / 0)
    with caplog.at_level(logging.WARNING), watching(run, [weak_one, listener.subscriber]):
        log(run, 70, 80, 90)
    assert told == listener.steps == [70, 80, 90]
    assert caplog.text.count(f"The weak one of {run} failed while handling a record (ValueError: no room)") == 1


def test_a_slow_one_holds_up_no_other_and_is_waited_for(run):
    may_go_on, told, listener = threading.Event(), [], Listener()
    arrived = threading.Event()

    def slow(record):
        assert may_go_on.wait(60)
        told.append(record["step"])

    others = Subscriber("other", on_record=lambda record: record["step"] == 80 and arrived.set())
    with watching(run, [Subscriber("slow one", on_record=slow), listener.subscriber, others]):
        log(run, 70)
        assert listener.looked.wait(60)
        log(run, 80)
        assert arrived.wait(60), "the slow one held up the others"
        assert told == []
        may_go_on.set()
    assert told == listener.steps == [70, 80]


def test_a_storage_that_is_away_for_a_while_costs_no_news(run, monkeypatch, caplog):
    listener, failed = Listener(), threading.Event()

    def away(*_):
        failed.set()
        raise ConnectionError("down")

    with watching(run, [listener.subscriber]):
        with monkeypatch.context() as patch:
            patch.setattr(watch.storage, "read_from", away)
            log(run, 70)
            assert failed.wait(60)
        log(run, 80)
    assert listener.steps == [70, 80]
    assert "Cannot read" in caplog.text


def test_a_line_is_read_once_it_is_complete_and_a_damaged_one_is_passed_over(run):
    reader = RunReader(run)
    assert sum(kind == "record" for kind, _ in reader.read()) == 7
    with Path(run, "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "lo')
        file.flush()
        assert list(reader.read()) == []
        file.write('ss": 1.0}\n{"step": 80, "los\n[]\n{"step": 90}\n')
    assert list(reader.read()) == [("record", {"step": 70, "loss": 1.0}), ("record", {"step": 90})]
