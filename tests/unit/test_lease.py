"""One driver a run or sweep, and how an onlooker knows that there is one."""

import json
import os
import subprocess
import sys
import time

import pytest

from raybert import lease
from raybert.errors import InputError
from raybert.lease import LEASE, Onlooker


@pytest.fixture
def brief(monkeypatch):
    """The pauses of a lease, in parts of a second."""
    for name, seconds in {"RENEW": 0.05, "EXPIRE": 1.0, "LOOK": 0.02}.items():
        monkeypatch.setattr(lease, name, seconds)


def write(directory, **lost):
    content = {"host": "another", "pid": 1, "time": time.time()} | lost
    (directory / LEASE).write_text(json.dumps(content))


def ended_process():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return {"host": os.uname().nodename, "pid": gone.pid}


def test_there_is_one_driver_at_a_time(tmp_path, brief):
    with lease.held(str(tmp_path)):
        with pytest.raises(InputError, match=f"Another driver, process {os.getpid()} on "), lease.held(str(tmp_path)):
            pass
        assert (tmp_path / LEASE).exists(), "the one that was refused ended the lease of the other"
    assert list(tmp_path.iterdir()) == []


def test_a_lost_driver_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LOOK", 60.0)  # longer than a test may take: these do not wait
    for lost in (ended_process(), {"time": time.time() - 601}):
        write(tmp_path, **lost)
        with lease.held(str(tmp_path)):
            assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()
    for content in ("", "[]", "{}", "null", '{"host": 1, "pid": "x", "time": 0}'):  # whatever lies there
        (tmp_path / LEASE).write_text(content)
        with lease.held(str(tmp_path)):
            pass


def test_a_driver_of_another_machine_is_given_up_when_it_renews_no_more(tmp_path, brief):
    write(tmp_path)
    start = time.monotonic()
    with lease.held(str(tmp_path)):
        assert time.monotonic() - start >= 1.0


def test_the_lease_ends_although_storage_does_not_answer(tmp_path, brief, monkeypatch):
    def away(*_):
        raise OSError("no answer")

    def work():
        monkeypatch.setattr(lease.storage, "remove", away)
        monkeypatch.setattr(lease.storage, "write_json", away)
        time.sleep(0.2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), lease.held(str(tmp_path)):
        work()


def test_an_onlooker_sees_whether_there_is_a_driver(tmp_path, brief):
    onlooker = Onlooker(str(tmp_path))
    assert not onlooker.driven()
    with lease.held(str(tmp_path)):
        for _ in range(3):
            assert onlooker.driven()
            time.sleep(0.5)  # together longer than EXPIRE: it is renewed
    assert not onlooker.driven()
    write(tmp_path, time=0)  # clocks do not count
    assert onlooker.driven()
    time.sleep(1.1)
    assert not onlooker.driven()
    write(tmp_path, **ended_process())
    assert not onlooker.driven()
