"""One driver a run or sweep: a file in its directory says who drives it, and is renewed for as long as that one lives.

Two drivers of one run would write each other's checkpoints and train on the same samples twice. No lock is asked of the
storage, since an object store has none: a driver that finds another one's name in the file ends at once.
"""

import logging
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raybert import storage
from raybert.errors import InputError, Interrupted

logger = logging.getLogger(__name__)

LEASE = "driver.json"
RENEW = 10.0  # seconds
FIRST_RENEWAL = 2.0  # until the first look whether another driver began at the same moment
EXPIRE = 60.0
LONG_AGO = 600.0  # more than the clocks of two machines differ by
LOOK = 1.0
FIELDS = {"token": str, "host": str, "machine": str, "pid": int, "started": str, "time": float}

_mine: set[str] = set()  # what this process drives


@contextmanager
def held(uri: str) -> Iterator[None]:
    """Drive this run or sweep alone inside the ``with``; inside another one for it, in the same process, a no-op.

    One whose driver was lost is taken over: at once where that was a process of this machine, or long ago; otherwise
    when its lease was not renewed for `EXPIRE` seconds of looking on. A driver that was given up in this way and comes
    back (its machine was suspended, or cut off from the storage) ends its process.

    Raises:
        InputError: another driver, here or on another machine, has it.
    """
    if uri in _mine:
        yield
        return
    _wait_for_lease(uri)
    token, ended, hurried = uuid.uuid4().hex, threading.Event(), False
    _write(uri, token)
    keeper = threading.Thread(target=_renew, args=(uri, token, ended), name="lease", daemon=True)
    keeper.start()
    _mine.add(uri)
    try:
        yield
    except KeyboardInterrupt as error:
        # A second Ctrl-C: whoever sends it does not want to wait for a storage that may be away.
        hurried = not isinstance(error, Interrupted)
        raise
    finally:
        _mine.discard(uri)
        ended.set()
        if not hurried:
            keeper.join(LOOK)
            # It expires by itself; and whatever ended the run is the news, not this.
            with suppress(Exception):
                if (found := _read(uri)) and found["token"] == token:
                    storage.remove(storage.join(uri, LEASE))


def _renew(uri: str, token: str, ended: threading.Event) -> None:
    pause = FIRST_RENEWAL
    while not ended.wait(pause):
        pause = RENEW
        try:
            found = _read(uri)
            if found and found["token"] != token:
                _end_this_process(uri, found)
                return
            if not ended.is_set():
                _write(uri, token)
        except Exception as error:  # storage is away for a while
            logger.warning("Cannot renew the lease of %s; retrying in %.0f s: %s", uri, RENEW, error)


def _end_this_process(uri: str, other: dict[str, Any]) -> None:
    """End this process as it is: whatever it saved now would be written over the other one's work."""
    print(
        f"Process {other['pid']} on {other['host']} has taken over {uri}; this process exits.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _wait_for_lease(uri: str) -> None:
    first = _read(uri)
    if first is None:
        return
    now: dict[str, Any] | None = first
    if first["machine"] != machine():
        onlooker = Onlooker(uri, EXPIRE)
        while (driven := onlooker.driven()) and (now := _read(uri)) in (None, first):
            time.sleep(LOOK)
        if not driven:
            return
    elif process_start(first["pid"]) != first["started"]:
        return
    who = now or first
    raise InputError(
        f"Another driver (process {who['pid']} on {who['host']}) is running {uri}; wait for it to finish, or stop it."
    )


class Onlooker:
    """Whether a run or sweep has a driver, as seen from any machine."""

    def __init__(self, uri: str, expire: float) -> None:
        self._uri, self._expire = uri, expire
        self._last: dict[str, Any] | None = None
        self._since = 0.0

    def driven(self) -> bool:
        """False where there is no lease, or one of a process that is gone.

        Of a process of another machine that shows in its lease: it is old, or was not renewed for `expire` seconds of
        looking on.
        """
        found = _read(self._uri)
        if found is None:
            return False
        if found["machine"] == machine():
            return process_start(found["pid"]) == found["started"]
        if time.time() - found["time"] > LONG_AGO:
            return False
        if found != self._last:
            self._last, self._since = found, time.monotonic()
        return time.monotonic() - self._since < self._expire


def _read(uri: str) -> dict[str, Any] | None:
    """None where there is no lease, and where what lies there is none."""
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        found = storage.read_json(storage.join(uri, LEASE))
        lease = {name: kind(found[name]) for name, kind in FIELDS.items()}
        return lease if math.isfinite(lease["time"]) else None
    return None


def _write(uri: str, token: str) -> None:
    pid = os.getpid()
    who = {"token": token, "host": socket.gethostname(), "machine": machine(), "pid": pid}
    storage.write_json(storage.join(uri, LEASE), {**who, "started": process_start(pid), "time": time.time()})


def machine() -> str:
    """Equal for two processes only when each can see the other by its process id."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def process_start(pid: int) -> str:
    """Tells two processes of one id apart; empty where there is none, or one that has ended and was not waited for."""
    try:
        # Behind the name, which may hold anything: the state, and as the 20th field the start in ticks since boot.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except (FileNotFoundError, ProcessLookupError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "runs"
    return ""
