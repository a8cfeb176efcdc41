"""One driver a run or sweep, and how an onlooker knows that there is one."""

import json
import os
import subprocess
import sys
import time

import pytest

from raybert.errors import InputError, RunFailed
from raybert.storage import lease
from raybert.storage.lease import LEASE, Onlooker

DRIVE = """
import sys, time
from raybert.storage import lease
lease.FIRST_RENEWAL = lease.RENEW = 0.05
with lease.held(sys.argv[1]):
    print("drives", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def brief(monkeypatch):
    """The pauses of a lease, in parts of a second."""
    for name, seconds in {"FIRST_RENEWAL": 0.02, "RENEW": 0.05, "EXPIRE": 1.0, "LOOK": 0.02}.items():
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def other(tmp_path):
    """A process that drives it."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVE, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"drives\n"
    yield process
    process.kill()
    process.wait()


def read(directory):
    return json.loads((directory / LEASE).read_text())


def write(directory, **lost):
    """The lease of a process of another machine."""
    content = {"token": "t", "host": "other", "machine": "m", "pid": 1, "started": "1", "time": time.time()} | lost
    (directory / LEASE).write_text(json.dumps(content))


def test_there_is_one_driver_at_a_time(tmp_path, other):
    with pytest.raises(InputError, match=rf"Another driver \(process {other.pid} on "), lease.held(str(tmp_path)):
        pass
    assert read(tmp_path)["pid"] == other.pid, "the one that was refused ended the lease of the other"
    write(tmp_path, **read(tmp_path) | {"time": 0})
    with pytest.raises(InputError), lease.held(str(tmp_path)):  # however long its machine slept, or its disk was full
        pass


def test_within_a_process_it_is_held_once(tmp_path):
    with lease.held(str(tmp_path)):
        token = read(tmp_path)["token"]
        with lease.held(str(tmp_path)):
            assert read(tmp_path)["token"] == token
        assert read(tmp_path)["token"] == token
    assert list(tmp_path.iterdir()) == []


def test_a_lost_driver_is_followed_by_another(tmp_path, other, monkeypatch):
    monkeypatch.setattr(lease, "LOOK", 60.0)  # longer than a test may take: these do not wait
    other.kill()
    while lease.process_start(other.pid):  # a zombie afterwards: nobody has waited for it
        time.sleep(0.01)
    with lease.held(str(tmp_path)):
        assert read(tmp_path)["pid"] == os.getpid()
    write(tmp_path, machine=lease.machine(), pid=os.getpid())  # its id is another process's now
    with lease.held(str(tmp_path)):
        pass
    write(tmp_path, time=time.time() - 601)
    with lease.held(str(tmp_path)):
        pass
    for content in ("", "[]", "{}", "null", '{"host": 1, "pid": "x", "time": 0}'):  # whatever lies there
        (tmp_path / LEASE).write_text(content)
        with lease.held(str(tmp_path)):
            pass


def test_a_driver_of_another_machine_is_given_up_when_it_renews_no_more(tmp_path, brief):
    write(tmp_path)
    start = time.monotonic()
    with lease.held(str(tmp_path)):
        assert time.monotonic() - start >= 1.0


def test_a_driver_of_another_machine_that_renews_is_left_alone(tmp_path, other, monkeypatch):
    monkeypatch.setattr(lease, "machine", lambda: "another")
    with pytest.raises(InputError, match=rf"Another driver \(process {other.pid} on "), lease.held(str(tmp_path)):
        pass


def test_of_two_drivers_the_one_that_finds_the_other_s_name_ends(tmp_path, other):
    """They began at the same moment, or this one was cut off and given up."""
    write(tmp_path, pid=7)
    _, said = other.communicate()
    assert other.returncode == 1
    assert b"Process 7 on other has taken over " in said
    assert read(tmp_path)["pid"] == 7


@pytest.mark.parametrize("error", [OSError, RunFailed])  # a disk; a bucket that does not answer
def test_the_lease_outlives_a_storage_that_is_away(tmp_path, brief, monkeypatch, error):
    written, write_json = [], lease.storage.write_json

    def flaky(uri, value):
        written.append(value["time"])
        if len(written) == 2:
            raise error("no answer")
        write_json(uri, value)

    def away(*_):
        raise error("no answer")

    def work():
        while len(written) < 4:
            time.sleep(0.01)
        monkeypatch.setattr(lease.storage, "remove", away)
        raise ZeroDivisionError

    monkeypatch.setattr(lease.storage, "write_json", flaky)
    with pytest.raises(ZeroDivisionError), lease.held(str(tmp_path)):
        work()


def test_an_onlooker_sees_whether_there_is_a_driver(tmp_path, brief):
    onlooker = Onlooker(str(tmp_path), expire=1.0)
    assert not onlooker.driven()
    with lease.held(str(tmp_path)):
        assert onlooker.driven()
    assert not onlooker.driven()
    write(tmp_path, time=time.time() + 300)  # clocks differ
    assert onlooker.driven()
    time.sleep(1.1)
    assert not onlooker.driven(), "it was not renewed"
    write(tmp_path)
    assert onlooker.driven()
    write(tmp_path, time=0)
    assert not Onlooker(str(tmp_path), expire=1.0).driven(), "it is of long ago"
