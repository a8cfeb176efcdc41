"""One driver a sweep: a file beside it says who drives it, and is renewed for as long as that one lives."""

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


@contextmanager
def held(sweep_uri: str) -> Iterator[None]:
    """Drive this sweep alone inside the ``with``.

    Raises:
        InputError: another driver, here or on another machine, is at it.
    """
    uri = storage.join(sweep_uri, LEASE)
    if storage.exists(uri) and (other := storage.read_json(uri)) and _alive(other):
        raise InputError(
            f"Another driver, process {other['pid']} on {other['host']}, is at work on the sweep {sweep_uri}; wait for "
            f"its end. (One that is lost is given up after {EXPIRE:.0f} seconds.)"
        )
    mine = {"host": socket.gethostname(), "pid": os.getpid()}

    def renew() -> None:
        # Storage may be away for a while; the next turn tries again.
        with suppress(OSError, InputError):
            _write(uri, mine)

    _write(uri, mine)
    try:
        with repeated(renew, seconds=RENEW, name="lease"):
            yield
    finally:
        storage.remove(uri)


def _write(uri: str, mine: dict[str, Any]) -> None:
    storage.write_json(uri, {**mine, "time": time.time()})


def _alive(lease: dict[str, Any]) -> bool:
    """It was renewed lately; and where it is a process of this machine, that process is still there."""
    if time.time() - lease["time"] > EXPIRE:
        return False
    return lease["host"] != socket.gethostname() or _runs(lease["pid"])


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
