"""RUN/report.html: what a run did, in one page that opens from disk with no network."""

from raybert.report.page import write_report

__all__ = ["write_report"]
