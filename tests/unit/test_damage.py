"""Files of a run that a power loss has cut, or that somebody has changed: they are named, and what is good is shown."""

import io
import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import raybert
from raybert import storage
from raybert.cli import run_app
from raybert.config import from_mapping
from raybert.errors import InputError
from raybert.model.files import save
from raybert.probe import record
from raybert.probe.baselines import Cache
from raybert.probe.classification import ClassificationTask
from raybert.probe.service import owner, queue
from raybert.probe.service.served import ServedRun
from raybert.probe.show import format_block, results_table
from raybert.ray_internals.names import SNAPSHOT
from raybert.records import format_line, parse_lines, parse_object, read_end, read_failure
from raybert.report import live
from raybert.report.figure import learning_figure
from raybert.report.page import render, write_report
from raybert.report.read import read_run
from raybert.report.terminal import closing_table
from raybert.report.trackers import figures, probe_figures
from raybert.report.watch import RunReader
from raybert.sweep import space
from raybert.sweep.summary import note_end, read_sweep
from raybert.train.check import check_inputs
from raybert.train.ingest import last_step
from raybert.train.ledger import Ledger
from raybert.train.recovery import faults
from raybert.train.recovery.repair import incomplete_checkpoints
from raybert.verify import verify
from tests.data import make_shards
from tests.runs import make_run, probe

RECORD = "probes/bbc_news-00000100.json"
FILES = ["config.yaml", "metrics.jsonl", RECORD, "ledger/00001-0000000001.jsonl", "checkpoint_manager_snapshot.json"]


def filled_run(folder: Path) -> Path:
    """A run with everything that one writes, as far as a reader opens it."""
    run = Path(make_run(folder, steps=200, validation_every=100, probe_every=100))
    ledger = Ledger(str(run), restored=0, workers=2)
    ledger.add(1, [step**5 for step in range(200)], [False] * 200)
    ledger.flush()
    faults.note(str(run), "resize", "two workers went on")
    names = [f"checkpoints/step-{step:08d}" for step in (100, 200)]
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    snapshot = {"checkpoint_results": results, "latest_checkpoint_result": results[-1]}
    (run / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return filled_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def run(whole, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def shown(what) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(what)
    return console.file.getvalue()


def said(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join(f"{captured.out} {captured.err}".split())


# -- every kind of damage, every reader ---------------------------------------------------------------------------

LOSS = re.compile(r'"loss": [0-9.]+', flags=re.ASCII)


def change_line(change):
    def damage(run):
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        lines[10] = change(lines[10])
        (run / "metrics.jsonl").write_bytes(b"".join(lines))

    return damage


def change_loss(value):
    return change_line(lambda line: LOSS.sub(f'"loss": {value}', line.decode(), count=1).encode())


LINES = {
    "nan": change_loss("NaN"),
    "infinity": change_loss("-Infinity"),
    "too large": change_loss("1e999"),
    "larger than any loss": change_loss("1e300"),
    "text for a number": change_loss('"high"'),
    "null": change_loss("null"),
    "list": change_loss("[1, 2]"),
    "true": change_loss("true"),
    "many digits": change_loss("9" * 5000),
    "joined": change_line(lambda line: line.rstrip()),
    "cut": change_line(lambda line: line[:40] + b"\n"),
    "no object": change_line(lambda line: b"[1, 2, 3]\n"),
    "a number": change_line(lambda line: b"17\n"),
    "step is text": change_line(lambda line: line.replace(b'"step": 100', b'"step": "100"')),
    "step is negative": change_line(lambda line: line.replace(b'"step": 100', b'"step": -100')),
    "step is a fraction": change_line(lambda line: line.replace(b'"step": 100', b'"step": 100.5')),
    "step is huge": change_line(lambda line: line.replace(b'"step": 100', b'"step": 1' + b"0" * 40)),
    "no UTF-8": change_line(lambda line: line.replace(b"loss", b"l\xff\xfes", 1)),
    "zeros": change_line(lambda line: b"\0" * len(line) + b"\n"),
    "nested": change_line(lambda line: b"[" * 100_000 + b"\n"),
    "validation is a number": change_line(lambda line: line.replace(b"}\n", b', "validation": 3}\n')),
    "validation holds text": change_line(lambda line: line.replace(b"}\n", b', "validation": {"loss": "x"}}\n')),
}


@pytest.mark.parametrize("damage", LINES.values(), ids=LINES)
def test_a_damaged_line_is_left_out_and_counted(run, capsys, damage):
    damage(run)
    found = read_run(str(run))
    assert len(found.records) in (19, 20)
    (part,) = found.left_out
    assert re.fullmatch(r"metrics\.jsonl has unreadable lines \(1 of 2[01]\)", str(part))
    assert run_app(["watch", str(run), "--once"]) == 0
    assert "ignored: metrics.jsonl has unreadable lines (1 of" in said(capsys)
    assert run_app(["verify", str(run)]) == 1
    assert "metrics.jsonl WRONG: has unreadable lines (1 of" in said(capsys)


def rewrite(change):
    def damage(run):
        described = json.loads((run / RECORD).read_text())
        change(described)
        (run / RECORD).write_text(json.dumps(described))

    return damage


RECORDS = {
    "empty": lambda run: (run / RECORD).write_bytes(b""),
    "zeros": lambda run: (run / RECORD).write_bytes(b"\0" * 4096),
    "cut": lambda run: (run / RECORD).write_bytes((run / RECORD).read_bytes()[:300]),
    "a list": lambda run: (run / RECORD).write_text("[]"),
    "nan": rewrite(lambda found: found["mean"].update(test_accuracy=float("nan"))),
    "above one": rewrite(lambda found: found["mean"].update(test_accuracy=71.2)),
    "text for a number": rewrite(lambda found: found["cls"].update(test_accuracy="0.7")),
    "half an interval": rewrite(lambda found: found["cls"].update(interval=[0.5])),
    "no square": rewrite(lambda found: found["pooler"]["confusion"].pop()),
    "another step": rewrite(lambda found: found.update(step=300)),
    "step is text": rewrite(lambda found: found.update(step="100")),
    "another task": rewrite(lambda found: found.update(task="sst2")),
    "no task": rewrite(lambda found: found.pop("task")),
    "baselines are a list": rewrite(lambda found: found.update(baselines=[])),
    "untrained is text": rewrite(lambda found: found["baselines"].update(untrained="bad")),
    "status is a number": rewrite(lambda found: found.update(status=3)),
    "another pooling is damaged": rewrite(lambda found: found.update(max={"test_accuracy": "x"})),
    "a lone surrogate": rewrite(lambda found: found.update(title="\ud83d")),
}


@pytest.mark.parametrize("damage", RECORDS.values(), ids=RECORDS)
def test_a_damaged_record_is_left_out_and_named(run, capsys, damage):
    damage(run)
    found = read_run(str(run))
    assert [probe.step for probe in found.probes] == [200]
    assert found.unrecorded("bbc_news") == [100]
    (part,) = found.left_out
    assert str(part).startswith(f"{RECORD} cannot be read: ")
    assert run_app(["verify", str(run)]) == 1
    assert f"{RECORD} WRONG: cannot be read" in said(capsys)
    for command in (["probe", "results", str(run)], ["probe", "results", str(run), "--json"]):
        assert run_app(command) == 0
        assert f"ignored: {RECORD} cannot be read" in said(capsys)
    assert run_app(["probe", "wait", str(run)]) == 0
    assert f"ignored: {RECORD} cannot be read" in said(capsys)
    assert run_app(["watch", str(run), "--once"]) == 0
    assert f"ignored: {RECORD} cannot be read" in said(capsys)
    whole = str(run / "probes/bbc_news-00000200.json")
    assert run_app(["probe", "compare", str(run / RECORD), whole]) == 2
    assert not any(word in said(capsys) for word in ("Traceback", "Error:"))


def test_the_page_says_what_it_leaves_out(run):
    LINES["joined"](run)
    LINES["nan"](run)
    RECORDS["cut"](run)
    (run / "failure.json").write_text('{"reason": "the lo')
    page = Path(write_report(str(run))).read_text()
    assert "This page ignores" in page
    assert "<li>metrics.jsonl has unreadable lines (1 of 20)</li>" in page  # two of them joined
    assert f"<li>{RECORD} cannot be read: not JSON" in page
    assert "failure.json, which records why it ended, cannot be read" in page


def test_the_page_of_a_run_in_order_leaves_nothing_out(whole):
    assert "This page ignores" not in render(read_run(str(whole)))


CONFIGS = {
    "empty": b"",
    "no YAML": b"run: [",
    "no UTF-8": b"run:\n  name: \xff\xfe\n",
    "a list": b"- 1\n",
    "text": b"hello",
    "zeros": b"\0" * 500,
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_a_run_whose_settings_are_damaged_is_shown_without_them(run, capsys, content):
    (run / "config.yaml").write_bytes(content)
    found = read_run(str(run))
    assert found.steps_done == found.steps_planned == 200
    assert "config.yaml cannot be read" in str(found.left_out[0])
    assert run_app(["verify", str(run)]) == 1
    assert "settings WRONG: " in (told := said(capsys))
    assert "config.yaml" in told
    assert "config.yaml cannot be read" in render(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run", 3),
        ("train", {"steps": "many"}),
        ("train", {"steps": -5}),
        ("every", {"probe": [2]}),
        ("every", {"probe": -1}),
        ("probe", {"tasks": 5}),
        ("about", [1]),
        ("about", {"seq_len": "x", "versions": 3, "cadences": {}}),
    ],
)
def test_settings_of_another_kind_are_not_believed(run, key, value):
    tree = yaml.safe_load((run / "config.yaml").read_text()) | {key: value}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    found = read_run(str(run))
    assert render(found)
    assert shown(closing_table(str(run)))
    assert learning_figure(found)
    assert all(isinstance(finding.fault, str) for finding in verify(str(run)))


def test_faults_that_cannot_be_read_are_named(run, capsys):
    assert len(list((run / "faults").iterdir())) == 1
    for name, content in (("1.json", "{"), ("2.json", '{"text": 3, "kind": "x"}'), ("3.json", "[]")):
        (run / "faults" / name).write_text(content)
    assert [fault["text"] for fault in faults.read_faults(str(run))[0]] == ["two workers went on"]
    assert list(faults.read_faults(str(run))[1]) == ["1.json", "2.json", "3.json"]
    assert run_app(["verify", str(run)]) == 1
    assert "faults/2.json WRONG" in said(capsys)
    assert run_app(["watch", str(run), "--once"]) == 0
    assert "ignored: faults/3.json cannot be read" in (told := said(capsys))
    assert "fault: two workers went on" in told


def test_what_says_how_a_run_ended_counts_though_it_is_cut(tmp_path):
    run = str(tmp_path)
    assert read_failure(run) == read_end(run) == {}
    for name in ("failure.json", "outcome.json"):
        (tmp_path / name).write_text('{"kind": "dive')
    assert "failure.json, which records why it ended, cannot be read" in read_failure(run)["reason"]
    assert read_failure(run)["kind"] == ""
    assert read_end(run)["status"] == "failed"
    (tmp_path / "outcome.json").write_text("{}")
    assert read_end(run) == {"status": "failed", "reason": ""}


def test_a_follower_passes_over_what_is_damaged(run):
    LINES["nan"](run)
    LINES["joined"](run)
    RECORDS["cut"](run)
    reader = RunReader(str(run))
    kinds = [kind for kind, _ in reader.read()]
    assert (kinds.count("record"), reader.damaged_lines, kinds.count("probe")) == (19, 1, 1)
    (run / RECORD).write_text(json.dumps(probe("bbc_news", 100, 200)))  # the service has done it anew
    assert [(kind, found["step"]) for kind, found in reader.read()] == [("probe", 100)]


def test_a_sweep_says_which_of_its_trials_files_are_damaged(tmp_path):
    base = {"train": {"steps": 200, "global_batch": 32, "micro_batch": 16}, "model": {"size": "tiny"}}
    tree = {"storage": str(tmp_path), "base": base, "space": {"optimizer.lr": {"grid": [1e-3, 2e-3, 3e-3]}}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tree | {"name": "s"}))
    sweep = space.load(str(tmp_path / "s.yaml"))
    for trial in space.trials(sweep)[:2]:
        make_run(tmp_path / "s" / "trials", name=trial.name, steps=200, validation_every=100, probe_every=100)
    first, second = (Path(trial.config.run_uri) for trial in space.trials(sweep)[:2])
    LINES["nan"](first)
    RECORDS["cut"](first)
    (first / "config.yaml").write_bytes(b"")
    third = space.trials(sweep)[2].config.run_uri
    note_end(third, "pruned")
    Path(third, "outcome.json").write_text('{"sta')
    one, two, three = read_sweep(sweep)
    assert one.status == "finished"
    assert one.tokens[-1] == two.tokens[-1], "the length of a sample is known from the other trial"
    assert "ignored: metrics.jsonl has unreadable lines (1 of" in one.reason
    assert f"ignored: {RECORD} cannot be read" in one.reason
    assert two.reason == ""
    assert three.status == "failed"
    assert second.exists()


# -- what goes on from it -----------------------------------------------------------------------------------------


def test_a_damaged_record_is_probed_anew(tmp_path):
    run, task = str(tmp_path), ClassificationTask(name="mine", train="/a.csv", test="/b.csv")
    uri = queue.record_uri(run, "mine", 7)

    def add():
        return queue.add(queue.Request(run, 7, (task,), positions=32, cpus=1, max_waiting=5))

    storage.write_bytes(uri, b"")
    assert add(), "a resumed run passes the step again"
    entry = queue.read_entry(run, 7)
    assert queue.open_tasks(entry) == [task]
    queue.write_record(entry, "mine", "done", {"seconds": 1.0})
    assert queue.open_tasks(entry) == []
    storage.write_bytes(uri, storage.read_bytes(uri)[:-9])
    assert queue.open_tasks(entry) == [task], "the step is still queued, so the probe can be done again"
    queue.finish(entry)
    queue.skip(run, 7, [task], "no room")
    assert queue.read_record(run, "mine", 7)["status"] == "skipped"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"tasks": 3}',
        b'{"tasks": [], "positions": 1, "cpus": NaN, "max_waiting": 1, "submitted": 1}',
        b'{"tasks": [], "positions": Infinity, "cpus": 1, "max_waiting": 1, "submitted": 1}',
        b'{"tasks": [], "positions": 1, "cpus": -1, "max_waiting": 1, "submitted": 1}',
        b'{"tasks": [], "positions": 1, "cpus": 1, "gpus": 1.5, "max_waiting": 1, "submitted": 1}',
        b"[" * 100_000,
    ],
)
def test_the_service_outlives_a_damaged_queue(tmp_path, content):
    run = str(tmp_path)
    storage.write_bytes(queue.queue_uri(run, 1), content)
    storage.write_bytes(f"{run}/probes/queue/step-x.json", b"")
    storage.write_bytes(f"{run}/probes/service.json", content)
    served = ServedRun(run, owner.Owner("me", "here"))
    served.advance()
    assert queue.waiting_steps(run) == []
    assert [found["status"] for found in served.news] == ["failed"]
    assert not owner.is_served(run)


def test_a_damaged_baseline_is_computed_again(tmp_path):
    compute = Mock(return_value={"test_accuracy": 0.5})
    cache = Cache(str(tmp_path))
    assert cache.get("key", compute) == cache.get("key", compute)
    (file,) = tmp_path.iterdir()
    file.write_text('{"test_acc')
    assert cache.get("key", compute) == {"test_accuracy": 0.5}
    assert compute.call_count == 2


def test_a_damaged_list_of_checkpoints_is_a_sentence(run):
    (run / "checkpoint_manager_snapshot.json").write_text('{"latest_checkpoint_result": {"checkpoint_dir_name": 3}}')
    with pytest.raises(InputError, match=r"checkpoint_manager_snapshot\.json, the list of checkpoints, is damaged"):
        last_step(str(run))
    assert incomplete_checkpoints(str(run)) == []


def test_a_run_whose_settings_were_lost_is_not_resumed(tmp_path):
    shards = make_shards(str(tmp_path / "shards"))
    config = from_mapping(
        {
            "run": {"name": "r", "storage": str(tmp_path)},
            "data": {"shards": shards.uri},
            "train": {"steps": 4, "global_batch": 4, "micro_batch": 4},
            "schedule": {"warmup_steps": 1},
        }
    )
    for content in (b"", b"run: {name: r}\n", b"run: ["):
        storage.write_bytes(f"{config.run_uri}/config.yaml", content)
        with pytest.raises(InputError, match=r"r/config\.yaml (is damaged|is not valid YAML)"):
            check_inputs(config)


def test_verify_looks_at_the_checkpoints_of_a_damaged_run(run):
    torch.manual_seed(0)
    model = raybert.Bert(raybert.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    save(model, str(run / "checkpoints" / "best"))
    RECORDS["cut"](run)
    weights = run / "checkpoints" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    faulty = {finding.subject: finding.fault for finding in verify(str(run)) if finding.fault}
    assert "model.safetensors has changed since it was written" in faulty["best"]
    assert "cannot be read" in faulty[RECORD]


def test_a_log_that_ends_before_the_newest_checkpoint_is_wrong(run):
    name = "checkpoints/step-00000200"
    (run / SNAPSHOT).write_text(json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": name}}))
    faulty = {finding.subject: finding.fault for finding in verify(str(run)) if finding.fault}
    assert "log" not in faulty
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:11]))
    faulty = {finding.subject: finding.fault for finding in verify(str(run)) if finding.fault}
    assert "metrics.jsonl lacks step 110 (10 steps in all)" in faulty["log"]


# -- any damage at all --------------------------------------------------------------------------------------------


@st.composite
def damages(draw):
    """(file, what becomes of its content): cut, bytes changed, a piece lost or doubled."""
    file = draw(st.sampled_from(FILES))
    kind = draw(st.sampled_from(["cut", "flip", "lose", "double"]))
    first, second = draw(st.floats(0, 1)), draw(st.floats(0, 0.2))
    changes = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))

    def damaged(content: bytes) -> bytes:
        start = int(first * len(content))
        stop = start + int(second * len(content))
        if kind == "cut":
            return content[:start]
        if kind == "lose":
            return content[:start] + content[stop:]
        if kind == "double":
            return content[:stop] + content[start:]
        flipped = bytearray(content)
        for place, value in changes if content else ():
            flipped[min(int(place * len(content)), len(content) - 1)] = value
        return bytes(flipped)

    return file, damaged


FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def damaged_copy(whole, copy, several) -> str:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    for file, damaged in several:
        (copy / file).write_bytes(damaged((copy / file).read_bytes()))
    return str(copy)


@settings(max_examples=60, **FUZZ)
@given(several=st.lists(damages(), min_size=1, max_size=3))
def test_no_damage_is_a_traceback(whole, tmp_path, several):
    run = damaged_copy(whole, tmp_path / "copy", several)
    found = read_run(run)
    assert shown(closing_table(run))
    state = live.State(run)
    state.refresh()
    assert shown(live.view(state, 100))
    assert all(isinstance(finding.fault, str) for finding in verify(run))
    for line in found.records:
        assert format_line(line, found.steps_planned)
        figures(line)
    for result in queue.records(run).values():
        assert format_block(result)
        probe_figures(result)
    shown(results_table(list(queue.records(run).values())))
    incomplete_checkpoints(run)


@settings(max_examples=5, **FUZZ)
@given(several=st.lists(damages(), min_size=1, max_size=3))
def test_a_page_is_drawn_whatever_the_damage(whole, tmp_path, several):
    run = damaged_copy(whole, tmp_path / "copy", several)
    assert "</html>" in Path(write_report(run)).read_text()
    assert learning_figure(read_run(run))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_an_object_is_read_or_refused(content):
    try:
        found = parse_object(content)
    except ValueError:
        return
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    json.dumps(found, ensure_ascii=False).encode()


@given(st.lists(st.binary(max_size=30)), st.integers(0, 5))
def test_good_lines_are_found_among_any_others(others, good):
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(good)]
    found = parse_lines(b"\n".join([*lines, *others]))
    assert list(found.records[:good]) == [{"step": step, "loss": 1.0} for step in range(good)]
    assert len(found.records) + found.damaged == good + sum(bool(p.strip()) for o in others for p in o.split(b"\n"))


@given(st.dictionaries(st.sampled_from(["step", "task", "status", "pooler", "mean", "baselines", "x"]), JSON))
def test_a_record_is_shown_or_refused(found):
    try:
        read = record.parse(json.dumps(found).encode())
    except ValueError:
        return
    if read["step"] is not None:
        assert format_block(read)
        assert shown(results_table([read]))
    probe_figures(read)
