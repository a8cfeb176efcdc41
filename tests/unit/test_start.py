"""What a run began with stands beside each of its probes, with the paired difference."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from raybert import storage
from raybert.config import from_mapping
from raybert.encode import POOLINGS
from raybert.encode.encoders import RaybertEncoder
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.probe.baselines import Cache
from raybert.probe.evaluate import evaluate, prepare
from raybert.probe.service import queue, work
from raybert.probe.service.owner import Owner
from raybert.probe.service.served import ServedRun
from raybert.probe.show import format_block, results_table
from raybert.probe.tasks import load_task
from raybert.report.live import probe_count
from raybert.report.trackers import probe_figures
from raybert.train.clock import Clock
from raybert.train.saver import Saver
from tests.tasks import make_task


def make_encoder(seed):
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    return RaybertEncoder(Bert(config))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return load_task(make_task(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def measure(task, tmp_path_factory):
    cache, encoder = Cache(str(tmp_path_factory.mktemp("cache"))), make_encoder(1)
    material = prepare(task, encoder.tokenize, encoder.positions)

    def done(seed, start=None, step=20):
        found = evaluate(make_encoder(seed), material, cache, start=start)
        return {**found, "step": step, "status": "done", "run": "a"}

    return done


def test_the_start_is_the_record_of_step_0_or_the_untrained_encoder(measure):
    first = measure(1, step=0)
    assert "start" not in first["baselines"]
    assert "beyond_start" not in first
    for start, expected in ((first, first), ("untrained", first["baselines"]["untrained"])):
        found = measure(2, start)
        json.dumps(found, allow_nan=False)
        assert found["baselines"]["start"] == {pooling: expected[pooling] for pooling in POOLINGS}
        for pooling in POOLINGS:
            beyond, before, now = found["beyond_start"][pooling], expected[pooling], found[pooling]
            for part, key in ((beyond, "test_accuracy"), (beyond["tuned"], "tuned_accuracy")):
                assert part["difference"] == pytest.approx(now[key] - before[key])
                assert part["interval"][0] <= part["difference"] <= part["interval"][1]
    itself = measure(1, first)
    assert {entry["difference"] for entry in itself["beyond_start"].values()} == {0.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"status": "failed", "reason": "no memory"}, "no memory"), ({"texts": "others"}, "with different texts")],
)
def test_a_start_that_cannot_be_compared_is_absent_with_its_reason(measure, change, reason):
    found = measure(2, measure(1, step=0) | change)
    assert reason in found["baselines"]["start"]["absent"]
    assert "beyond_start" not in found
    assert "gain over the start" not in format_block(found)
    assert not [name for name in probe_figures(found) if name.endswith("_start")]


def test_the_start_is_shown_in_the_log_the_table_and_the_trackers(measure):
    first = measure(1, step=0)
    found = measure(2, first)
    block = format_block(found)
    assert f"start {first['pooler']['test_accuracy']:.4f}, majority" in block
    assert (
        f"gain over the start, in points: pooler {100 * found['beyond_start']['pooler']['difference']:+.1f} [" in block
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(results_table([first, found]))
    text = console.file.getvalue()
    assert "start" in text.splitlines()[1]
    assert " / ".join(f"{100 * first[pooling]['test_accuracy']:.1f}" for pooling in POOLINGS) in text
    assert probe_figures(found)["probe/mine/mean_start"] == first["mean"]["test_accuracy"]
    assert probe_figures(found)["probe/mine/mean_tuned"] == found["mean"]["tuned_accuracy"]
    assert probe_figures(found)["probe/mine/mean_tuned_c"] == found["mean"]["tuned_c"]
    assert probe_figures(found)["probe/mine/mean_gain"] == found["beyond_start"]["mean"]["difference"]


def request(run, step, task, **options):
    return queue.Request(run, step, (task,), positions=32, cpus=1, max_waiting=2, **options)


def test_a_probe_finds_what_its_run_began_with(task, tmp_path):
    run = str(tmp_path)

    def start_of(step, **options):
        wanted = request(run, step, task, **options)
        storage.remove(queue.queue_uri(run, step))
        assert queue.add(wanted)
        return work._start(queue.read_entry(run, step), task.name)

    assert start_of(20) is None
    assert start_of(20, begins_random=True) == "untrained"
    assert start_of(0) is None
    record = queue.write_record(queue.read_entry(run, 0), task.name, "failed", {"reason": "no memory"})
    assert start_of(40) == record
    storage.write_bytes(queue.record_uri(run, task.name, 0), b'{"st')
    assert "is damaged" in start_of(60)["reason"]
    entry = storage.read_json(queue.queue_uri(run, 20))
    del entry["begins_random"]  # as an older version queued it
    storage.write_json(queue.queue_uri(run, 20), entry)
    assert not queue.read_entry(run, 20).begins_random


def test_the_start_is_never_skipped(task, tmp_path):
    run = str(tmp_path)
    for step in (0, 1, 2, 3, 4):
        queue.add(request(run, step, task))
    served = ServedRun(run, Owner("me", "here"))
    served.advance()
    assert [record["step"] for record in served.news] == [1, 2]
    assert served.next.entry.step == 0


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        ({}, []),
        ({"attention_init": "average"}, [0]),
        ({"embedding_init": "spectral"}, [0]),
        ({"embedding_init": "whitened"}, [0]),
        ({"ffn_init": "zero"}, [0]),
        ({"output_init": "centred"}, [0]),
        ({"mlm_init": "unigram"}, []),
    ],
)
def test_a_run_queues_its_start_where_it_is_no_untrained_encoder(task, tmp_path, monkeypatch, model, steps):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    saver = Saver.__new__(Saver)  # without the Ray Train worker that it lives in
    saver.config = from_mapping(
        {"run": {"name": "run", "storage": str(tmp_path)}, "model": sizes | model, "probe": {"tasks": ["bbc_news"]}}
    )
    saver.tasks, saver.clock, saver.model = [task], Clock(), make_encoder(1).module
    saver.gate = SimpleNamespace(hold=lambda snap: None)
    queued = []
    monkeypatch.setattr(saver, "_request_probe", lambda weights, step: queued.append(step))
    saver.writer = SimpleNamespace(submit=lambda job: job())
    saver.probe_start()
    assert queued == steps
    assert probe_count(saver.config) == -(-saver.config.train.steps // saver.config.every.probe) + len(steps)
    saver.tasks, saver.writer = [], None
    saver.probe_start()  # of a run without probes, and of another rank
    assert queued == steps
