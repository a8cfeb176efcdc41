"""What is decided when something went wrong, without a cluster: which checkpoint, and who hangs."""

import errno
import json
import shutil
import threading

import pytest
import torch
from ray.exceptions import RayActorError

from raybert import storage
from raybert.errors import InputError, RunFailed
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.directory import REQUIRED, SUMS, TRAINING_STATE
from raybert.model.optimizer import build
from raybert.ray_internals.names import SNAPSHOT
from raybert.storage.retry import retry
from raybert.train import checkpoint
from raybert.train.recovery import faults, supervise
from raybert.train.recovery import watchdog as hang
from raybert.train.recovery.committed import last_step
from raybert.train.recovery.repair import incomplete_checkpoints, repair
from raybert.train.recovery.supervise import _repair_or_fail
from raybert.train.recovery.watchdog import FIRST_STEP, HangWatch, Rank, stalled_ranks
from tests.gcs import Fault


@pytest.fixture
def run(tmp_path):
    """Three committed checkpoints, as Ray Train notes them."""
    config = BertConfig(vocab_size=101, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    bert = Bert(config)
    adam = build(bert, lr=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-6)
    results = []
    for step in (10, 20, 30):
        snap = checkpoint.snapshot(bert, adam, step=step, elapsed_seconds=0.0, best_validation_loss=1.0)
        checkpoint.write(snap, f"{tmp_path}/checkpoints/step-{step:08d}")
        results.append({"version": 0, "checkpoint_dir_name": f"checkpoints/step-{step:08d}", "metrics": {"step": step}})
    record = {
        "ray_version": "2.60.0",
        "checkpoint_results": results,
        "checkpoint_report_indices": [0, 1, 2],
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 3,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    (tmp_path / SNAPSHOT).write_text(json.dumps(record))
    return tmp_path


def commit_another(run):
    """A fourth checkpoint, as Ray Train notes it."""
    record = json.loads((run / SNAPSHOT).read_bytes())
    shutil.copytree(run / "checkpoints/step-00000030", run / "checkpoints/step-00000040")
    newest = {"version": 0, "checkpoint_dir_name": "checkpoints/step-00000040", "metrics": {"step": 40}}
    record["checkpoint_results"].append(newest)
    record["checkpoint_report_indices"].append(3)
    record["latest_checkpoint_result"] = newest
    (run / SNAPSHOT).write_text(json.dumps(record))


def test_nothing_is_changed_when_all_is_well(run):
    before = (run / SNAPSHOT).read_bytes()
    assert repair(str(run)) == []
    assert (run / SNAPSHOT).read_bytes() == before


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(run, name, how):
    path = run / "checkpoints" / "step-00000030" / name
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-1])
    (told,) = repair(str(run))
    assert "step-00000030" in told
    assert name in told
    assert "step-00000020" in told
    assert last_step(str(run)) == 20
    assert (run / "checkpoints" / "damaged-step-00000030").is_dir()
    assert [fault["kind"] for fault in faults.read_faults(str(run))[0]] == ["damaged_checkpoint"]
    assert repair(str(run)) == []


@pytest.mark.parametrize("name", [*REQUIRED, SUMS])
def test_what_a_deletion_left_that_was_cut_short_is_removed(run, name):
    """Ray Train takes an old checkpoint off its record first, and tries to delete it once."""
    old, whole = run / "checkpoints" / "step-00000005", run / "checkpoints" / "step-00000007"
    for place in (old, whole):
        shutil.copytree(run / "checkpoints" / "step-00000010", place)
    (old / name).unlink()
    (run / "checkpoints" / "best").mkdir()
    assert incomplete_checkpoints(str(run)) == [str(old)]
    assert repair(str(run)) == []
    assert not old.exists()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best",
        *(f"step-{step:08d}" for step in (7, 10, 20, 30)),
    ]
    (run / "checkpoints" / "step-00000030" / name).unlink()  # on the record: damaged, and kept for whoever looks
    assert incomplete_checkpoints(str(run)) == []
    assert len(repair(str(run))) == 1


def test_a_list_that_is_gone_is_made_again(run):
    (run / SNAPSHOT).unlink()
    (told,) = repair(str(run))
    assert "was missing" in told
    assert last_step(str(run)) == 30
    assert repair(str(run)) == []


def test_what_was_about_to_be_replaced_gets_its_name_back(run):
    (run / "checkpoints" / ".before-best").mkdir()
    (run / "checkpoints" / ".best-x1").mkdir()
    assert repair(str(run)) == []
    assert (run / "checkpoints" / "best").is_dir()
    (run / "checkpoints" / ".before-best").mkdir()
    assert repair(str(run)) == []
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best",
        *(f"step-{step:08d}" for step in (10, 20, 30)),
    ]


def test_a_list_that_is_gone_names_what_is_damaged(run):
    (run / SNAPSHOT).unlink()
    for step in (10, 20, 30):
        (run / "checkpoints" / f"step-{step:08d}" / TRAINING_STATE).write_bytes(b"")
    assert len(repair(str(run))) == 3
    assert last_step(str(run)) == 0
    assert (run / "checkpoints" / "damaged-step-00000030").is_dir()
    assert repair(str(run)) == []


def test_a_fault_that_cannot_be_read_hides_no_other(run):
    faults.note(str(run), "a", "first")
    (run / "faults" / "0-broken.json").write_text("")
    faults.note(str(run), "b", "second")
    seen = set()
    assert [fault["kind"] for fault in faults.read_faults(str(run), seen)[0]] == ["a", "b"]
    assert faults.read_faults(str(run), seen) == ([], {})


def test_a_run_without_a_checkpoint_needs_no_list(tmp_path):
    assert repair(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_when_all_are_damaged_the_run_begins_anew(run):
    for step in (10, 20, 30):
        (run / "checkpoints" / f"step-{step:08d}" / TRAINING_STATE).write_bytes(b"")
    assert len(repair(str(run))) == 3
    assert last_step(str(run)) == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"checkpoint_results": 3}'])
def test_a_damaged_record_is_made_again_from_whole_checkpoints(run, content):
    (run / SNAPSHOT).write_bytes(content)
    (run / "checkpoints" / "step-00000020" / "model.safetensors").write_bytes(b"")
    storage.remove(str(run / "checkpoints" / "step-00000030" / "config.json"))
    assert repair(str(run))
    assert last_step(str(run)) == 10
    record = json.loads((run / SNAPSHOT).read_bytes())
    assert [r["checkpoint_dir_name"] for r in record["checkpoint_results"]] == ["checkpoints/step-00000010"]


def test_a_checkpoint_that_is_gone_is_taken_off_the_record(run):
    storage.remove(str(run / "checkpoints" / "step-00000010"))
    assert repair(str(run))
    assert last_step(str(run)) == 30


def test_a_run_whose_checkpoints_are_all_gone_does_not_begin_anew_by_itself(run):
    """A disk that is not mounted looks like this."""
    (run / "checkpoints").rename(run / "away")
    with pytest.raises(RunFailed, match=r"lists 3 checkpoints, but none of them exists"):
        repair(str(run))
    (run / "away").rename(run / "checkpoints")
    assert repair(str(run)) == []
    assert last_step(str(run)) == 30


def test_a_run_of_which_nothing_is_left_does_not_begin_anew_behind_a_failure(run, tmp_path_factory):
    _repair_or_fail(str(run), had=30)
    empty = str(tmp_path_factory.mktemp("empty"))
    _repair_or_fail(empty, had=0)  # a run that has not come to its first checkpoint
    with pytest.raises(RunFailed, match=r"The checkpoint of step 30 of .* is gone"):
        _repair_or_fail(empty, had=30)


def test_a_storage_that_does_not_let_us_in_says_nothing_of_a_checkpoint(run, gcs):
    bucket = gcs.create_bucket("not-let-in")
    for path in (path for path in run.rglob("*") if path.is_file()):
        storage.upload_file(path, f"{bucket}/run/{path.relative_to(run)}")
    for name in (SUMS, "model.safetensors", SNAPSHOT):
        gcs.inject(Fault("status", match=f"{name}.*alt=media", status=403))
        with pytest.raises(InputError, match="no permission"):
            repair(f"{bucket}/run")
    gcs.inject()
    assert repair(f"{bucket}/run") == []
    assert last_step(f"{bucket}/run") == 30


def test_checksums_are_those_of_sha256sum(run):
    lines = (run / "checkpoints" / "step-00000010" / SUMS).read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["config.json", "model.safetensors", "training_state.pt"]


def test_patience_ends(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    calls = []

    def fails(times, error):
        def action():
            calls.append(1)
            if len(calls) <= times:
                raise error
            return "done"

        calls.clear()
        return action

    assert retry(fails(3, OSError(errno.ENOSPC, "No space left on device")), "writing x", seconds=60) == "done"
    assert len(calls) == 4
    with pytest.raises(InputError):
        retry(fails(1, InputError("wrong key")), "writing x", seconds=60)
    assert len(calls) == 1
    with pytest.raises(ConnectionError):
        retry(fails(10**9, ConnectionError("down")), "writing x", seconds=0)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("Task was killed due to the node running low on memory."), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "disk_full"),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), "disk_full"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer."), "peer_lost"),
        (ValueError("something else"), "error"),
    ],
)
def test_failures_are_named(error, kind):
    assert faults.describe(error)[0] == kind


class WorkerHealthCheckFailedError(Exception):
    """Ray Train's, with what Ray says of an actor that is gone."""


def test_a_process_that_died_alone_is_not_taken_for_a_lost_node():
    about = "Worker info: Worker(\n    node_id='b2960ff0',\n    pid=11097,\n)\nThe actor died unexpectedly.\n"
    alone = (
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. Consider enabling resource isolation to prevent "
        "node deaths by resource contention."
    )
    with_node = (
        "The actor died because its node has died. Node Id: b2960ff0\n\tthe actor's node was terminated unexpectedly: "
        "health check failed due to missing too many heartbeats"
    )
    assert faults.describe(WorkerHealthCheckFailedError(about + alone))[0] == "process_died"
    kind, text = faults.describe(WorkerHealthCheckFailedError(about + with_node))
    assert kind == "node_lost"
    assert "its node has died. Node Id: b2960ff0" in text


@pytest.mark.parametrize(("max_failures", "starts"), [(0, 1), (1, 3), (3, 5)])
def test_only_failures_without_a_new_checkpoint_between_them_end_a_run(run, monkeypatch, max_failures, starts):
    monkeypatch.setattr(supervise, "LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(supervise, "remove_orphans", lambda: 0)  # there is no Ray
    calls = []

    def fit():
        calls.append(last_step(str(run)))
        if len(calls) == 2:
            commit_another(run)
        raise RayActorError

    with pytest.raises(RunFailed, match=r"stopped: the controller of the run was lost\."):
        supervise.fit_with_restarts(fit, str(run), max_failures=max_failures, patience=0)
    assert len(calls) == starts
    noted = [fault["failures"] for fault in faults.read_faults(str(run))[0] if fault["kind"] == "restart"]
    assert noted == ([1, *range(1, max_failures + 1)] if max_failures else [])


def test_the_input_fault_is_found_through_wrappers():
    inner = InputError("Row group 3 of x is damaged.")
    outer = RuntimeError("the stream failed")
    outer.__cause__ = inner
    assert faults.input_fault(outer) == "Row group 3 of x is damaged."
    assert faults.input_fault(ValueError("x")) == ""
    wrapped = RuntimeError("task failed")
    wrapped.cause = inner  # type: ignore[attr-defined]
    outer.__cause__ = wrapped
    assert faults.input_fault(outer) == "Row group 3 of x is damaged."


@pytest.fixture(autouse=True)
def watched_by_hand(monkeypatch):
    """A watch does nothing by itself here: its thread would note and end, 100 seconds later, those who hang."""
    monkeypatch.setattr(HangWatch, "_watch", lambda self: None)


def ranks(now, *known):
    return {
        rank: Rank("node", rank, step=step, phase=phase, stack=stack, moved=now - still, heard=now - silent)
        for rank, (step, phase, stack, still, silent) in enumerate(known)
    }


def test_a_hang_is_blamed_on_the_one_that_others_wait_for():
    def blamed(*known):
        return stalled_ranks(ranks(1000.0, *known), now=1000.0, limit=20, silence=20, patience=100)

    waiting = (5, "step", "in train_step\n  dist.all_reduce(masked)", 30, 1)
    assert blamed() == []
    assert blamed((5, "step", "", 3, 1), (5, "step", "", 3, 1)) == []
    assert blamed(waiting, (5, "step", "", 3, 1)) == [], "one that moves is worth waiting for"
    assert blamed(waiting, (5, "step", "", 30, 25)) == [1], "stopped altogether"
    assert blamed(waiting, (5, "step", "in forward\n  time.sleep(99)", 30, 1)) == [1]
    assert blamed(waiting, (5, "data", "in next", 30, 1)) == [], "storage may be away for a while"
    assert blamed(waiting, (5, "data", "in next", 130, 1)) == [1]
    assert blamed(waiting, (4, *waiting[1:])) == [1], "all in an exchange: the one that is behind"


def test_a_rank_without_a_pulse_is_missed_before_the_first_step_is_done():
    known = ranks(1000.0, (0, "start", "", 300, 1), (0, "start", "", 300, 30))
    assert stalled_ranks(known, now=1000.0, limit=900, silence=20, patience=100) == [1]
    del known[1]
    assert stalled_ranks(known, now=1000.0, limit=900, silence=20, patience=100) == []


def test_all_who_hang_are_noted_before_any_is_ended(monkeypatch, tmp_path):
    did = []
    monkeypatch.setattr(hang.faults, "note", lambda uri, kind, text, **details: did.append(("note", details["rank"])))
    monkeypatch.setattr(hang, "on_its_node", lambda rank, what: did.append((what.__name__, rank.pid)) or "")
    watch = HangWatch(str(tmp_path), factor=20, least=100, patience=0)
    blamed = [(rank, Rank("node", 10 + rank, step=5, progress=9, stack="at work")) for rank in range(4)]
    watch.beat(2, "node", 12, 6, 10, "step", "")  # got ahead after all
    watch.beat(3, "node", 13, 5, 9, "step", "")  # has a pulse, and no more
    watch._end(blamed, now=0.0)
    assert sorted(did[:3]) == [("note", 0), ("note", 1), ("note", 3)]
    assert did[3:] == [("end_process", 10), ("end_process", 11), ("end_process", 13)]


def test_a_hang_is_ended_although_it_cannot_be_noted(monkeypatch, tmp_path):
    did = []
    monkeypatch.setattr(hang, "NOTING", 0.05)
    monkeypatch.setattr(hang.faults, "note", lambda *_, **__: threading.Event().wait())
    monkeypatch.setattr(hang, "on_its_node", lambda rank, what: did.append(what.__name__) or "")
    HangWatch(str(tmp_path), factor=20, least=100, patience=0)._end([(0, Rank("node", 10))], now=0.0)
    assert did == ["stack_of", "end_process"]


def test_the_way_to_the_restored_step_says_nothing_of_a_step_s_time(tmp_path):
    watch = HangWatch(str(tmp_path), factor=20, least=100, patience=0)
    watch.beat(0, "node", 1, 0, 0, "start", "")
    watch.beat(0, "node", 1, 1000, 1, "step", "")
    assert watch.limit == FIRST_STEP
    watch.beat(0, "node", 1, 1001, 2, "step", "")
    assert watch.limit == 100


def test_what_a_killed_writer_left_is_swept_up(tmp_path):
    (tmp_path / "checkpoints" / ".step-00000010-abc").mkdir(parents=True)
    (tmp_path / "checkpoints" / "best").mkdir()
    assert repair(str(tmp_path)) == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best"]
