"""RUN/report.html while the run goes on: written again when a validation or a probe is new."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raybert.errors import Interrupted
from raybert.report.page import write_report
from raybert.report.watch import Subscriber

logger = logging.getLogger(__name__)

# Seconds between two pages, and at least so many times what one took: drawing must not take a core from training.
LEAST, SHARE = 15.0, 20.0


class Page:
    """Knows when the page is out of date, and writes it no more often than it may."""

    def __init__(self, run_uri: str) -> None:
        self._run_uri = run_uri
        self._stale, self._not_before = False, 0.0

    def note(self, record: dict[str, Any]) -> None:
        """A line of the log or a probe record is new."""
        self._stale |= "validation" in record or "task" in record

    def write_if_due(self) -> None:
        if self._stale and time.monotonic() >= self._not_before:
            self.write()

    def write(self) -> None:
        start = time.monotonic()
        self._not_before = start + LEAST  # where it fails, too
        write_report(self._run_uri)
        self._stale = False
        self._not_before = time.monotonic() + max(LEAST, SHARE * (time.monotonic() - start))


@contextmanager
def kept_current(run_uri: str) -> Iterator[Subscriber]:
    """A subscriber that keeps the run's page up to date; at the end the page is complete."""
    page, hurried = Page(run_uri), False
    try:
        yield Subscriber("page", on_record=page.note, on_probe=page.note, on_look=page.write_if_due)
    except KeyboardInterrupt as error:
        hurried = not isinstance(error, Interrupted)  # a second Ctrl-C: whoever sends it does not want to wait
        raise
    finally:
        try:
            if not hurried:
                page.write()
        except Exception as error:  # the run itself is in order
            logger.warning("Cannot write the report of %s: %s", run_uri, error)
