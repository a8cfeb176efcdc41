"""RUN/report.html: what a run did, in one page that opens from disk with no network."""
