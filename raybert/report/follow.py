"""RUN/report.html while the run goes on: written again when a validation or a probe is new."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raybert.errors import Interrupted
from raybert.report.page import write_report
from raybert.train.watch import Watcher

logger = logging.getLogger(__name__)

# Seconds between two pages, and at least so many times what one took: drawing must not take a core from training.
LEAST, SHARE = 15.0, 20.0


class Page:
    """Knows when the page is out of date, and writes it no more often than it may."""

    def __init__(self, run_uri: str) -> None:
        self._run_uri = run_uri
        self._stale, self._not_before = False, 0.0
        self.given_up = False

    def note(self, record: dict[str, Any]) -> None:
        """A line of the log or a probe record is new."""
        self._stale |= "validation" in record or "task" in record

    def write_if_due(self) -> None:
        if self._stale and not self.given_up and time.monotonic() >= self._not_before:
            self.write()

    def write(self) -> None:
        start = time.monotonic()
        self._not_before = start + LEAST  # where it fails, too
        write_report(self._run_uri)
        self._stale = False
        self._not_before = time.monotonic() + max(LEAST, SHARE * (time.monotonic() - start))


@contextmanager
def kept_current(run_uri: str) -> Iterator[None]:
    """Keep the run's page current inside the ``with``, from a thread of this process; at its end it is whole."""
    page = Page(run_uri)
    try:
        with Watcher(run_uri, on_record=page.note, on_probe=page.note, on_look=page.write_if_due):
            try:
                yield
            except KeyboardInterrupt as error:
                # A second Ctrl-C: whoever sends it does not want to wait.
                page.given_up = not isinstance(error, Interrupted)
                raise
    finally:
        try:
            if not page.given_up:
                page.write()
        except Exception as error:  # the run itself is in order
            logger.warning("The report of %s could not be written: %s", run_uri, error)
