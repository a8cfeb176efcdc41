"""Waiting out a storage that fails for a while: down, throttled, or a disk that is full for the moment."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from raybert.errors import InputError

T = TypeVar("T")
logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
# What waiting does not change: wrong names and settings, and faults of the program.
FINAL = (InputError, FileNotFoundError, ValueError, TypeError, KeyError, AttributeError)


def retry(action: Callable[[], T], what: str, *, seconds: float, final: tuple[type[Exception], ...] = FINAL) -> T:
    """Run an action, and retry it with growing pauses while it fails, for at most `seconds`.

    Args:
        action: may be done again after it failed half-way.
        what: names it in the log, as in "writing gs://bucket/x".
        final: exceptions that waiting does not change.

    Raises:
        Exception: the last one, when the time is over; one of `final` at once.
    """
    end, pause, warned = time.monotonic() + seconds, FIRST_PAUSE, False
    while True:
        try:
            result = action()
        except final:
            raise
        except Exception as error:
            left = end - time.monotonic()
            if left <= 0:
                raise
            if not warned:
                logger.warning("%s failed (%s: %s); retrying for %.0f s", what, type(error).__name__, error, left)
                warned = True
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            if warned:
                logger.warning("%s succeeded after retrying", what)
            return result
