"""Something that a thread does again and again, beside the work in a ``with``."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(action: Callable[[], object], *, seconds: float, name: str, join: float | None = None) -> Iterator[None]:
    """Inside the ``with``, do it every so many seconds; the first time after the first of these pauses.

    Args:
        action: must not raise: that would end the thread.
        join: seconds that the end waits for one that is under way; None waits until it is done.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(join)
