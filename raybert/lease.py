"""One driver a run or sweep: a file in its directory says who drives it, and is renewed for as long as that one lives.

Two drivers of one run would write each other's checkpoints and train on the same samples twice.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from raybert import storage
from raybert.errors import InputError
from raybert.repeat import repeated

LEASE = "driver.json"
RENEW = 10.0  # seconds
EXPIRE = 60.0
LONG_AGO = 600.0  # more than the clocks of two machines differ by
LOOK = 1.0


@contextmanager
def held(uri: str) -> Iterator[None]:
    """Drive this run or sweep alone inside the ``with``.

    One whose driver was lost is taken over: at once where that was a process of this machine, or long ago; otherwise
    when its lease was not renewed for `EXPIRE` seconds of looking on.

    Raises:
        InputError: another driver, here or on another machine, is at it.
    """
    _wait_for_the_end(uri)
    mine = {"host": socket.gethostname(), "pid": os.getpid()}

    def renew() -> None:
        # Storage may be away for a while; the next turn tries again.
        with suppress(OSError, InputError):
            _write(uri, mine)

    _write(uri, mine)
    try:
        with repeated(renew, seconds=RENEW, name="lease", join=RENEW):
            yield
    finally:
        # It expires by itself; and whatever ended the run is the news, not this.
        with suppress(OSError, InputError):
            storage.remove(storage.join(uri, LEASE))


def _wait_for_the_end(uri: str) -> None:
    first = _read(uri)
    if first is None or _gone(first) or time.time() - first["time"] > LONG_AGO:
        return
    onlooker = Onlooker(uri)
    while onlooker.driven():
        time.sleep(LOOK)
        now = _read(uri)
        if now not in (None, first):
            raise InputError(
                f"Another driver, process {now['pid']} on {now['host']}, is at work on {uri}; wait for its end, or end "
                "it first."
            )


class Onlooker:
    """Whether somebody drives a run or sweep, seen from any machine: the clocks of two are never compared."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._last: dict[str, Any] | None = None
        self._since = 0.0

    def driven(self) -> bool:
        """False where nobody has the lease, or its holder has not renewed it for long while this looked on."""
        found = _read(self._uri)
        if found is None or _gone(found):
            return False
        if found != self._last:
            self._last, self._since = found, time.monotonic()
        return time.monotonic() - self._since < EXPIRE


def _read(uri: str) -> dict[str, Any] | None:
    """None where there is no lease, and where what lies there is none."""
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        found = storage.read_json(storage.join(uri, LEASE))
        return {"host": str(found["host"]), "pid": int(found["pid"]), "time": float(found["time"])}
    return None


def _write(uri: str, mine: dict[str, Any]) -> None:
    storage.write_json(storage.join(uri, LEASE), {**mine, "time": time.time()})


def _gone(lease: dict[str, Any]) -> bool:
    """Its process was one of this machine, and is not there any more."""
    return bool(lease["host"] == socket.gethostname() and not _runs(lease["pid"]))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
