"""A checked run from its first step to its report: what `raybert pretrain` and the demo do alike."""

from contextlib import AbstractContextManager

from raybert.probe.service import client
from raybert.report import trackers
from raybert.report.follow import kept_current
from raybert.report.watch import Subscriber, watching
from raybert.spectral import table
from raybert.storage import lease
from raybert.train.check import Run
from raybert.train.recovery.committed import last_step
from raybert.train.run import train


def drive(run: Run, shown: AbstractContextManager[Subscriber], *, wait_for_probes: bool) -> None:
    """Train until the last step, and keep the page, the trackers and the terminal up to date.

    Args:
        shown: the display in the terminal; entered here (see `raybert.report.live`).
        wait_for_probes: return when every checkpoint is probed; for a Ray that ends with this process, and the probe
            service with it.

    Raises:
        InputError, RunFailed, Interrupted: as `raybert.train.run.train`.
    """
    with lease.held(run.uri):
        if last_step(run.uri) < run.config.train.steps:
            # Before the bars of the run, since it has one of its own.
            table.for_run(run.config, run.shards, cpus=run.shares.worker, show=True)
        with (
            kept_current(run.uri) as page,
            trackers.opened(run.config) as tracking,
            shown as terminal,
            watching(run.uri, [page, *tracking, terminal]),
        ):
            train(run)
            if wait_for_probes and run.config.probe.tasks:
                client.wait(run.uri, run.config.run.storage)
