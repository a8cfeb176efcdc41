"""A sweep from its first trial to the page that answers it."""

from rich.console import Console

from raybert import storage
from raybert.errors import RunFailed
from raybert.sweep.page import write_summary
from raybert.sweep.run import run_sweep, wait_for_probes
from raybert.sweep.space import SweepConfig
from raybert.sweep.summary import read_sweep, require_none_failed
from raybert.sweep.table import summary_table
from raybert.train.recovery.placement_groups import removed_meanwhile

# Seconds that a sweep waits, on a cluster, for its last probes before it writes its summary without them.
PROBE_PATIENCE = 600.0


def sweep_and_summarise(sweep: SweepConfig, *, resume: bool, local: bool) -> None:
    """Run the trials, wait for their probes, and print the table and, as the last line, the page's path.

    In a `local` Ray the probe service ends with this process, so all probes are waited for. A sweep that is interrupted
    or fails shows first what was found until then.

    Raises:
        KeyboardInterrupt, RunFailed: the sweep did not come to its end, or a trial of it failed.
    """
    ended: KeyboardInterrupt | RunFailed | None = None
    try:
        # A trial that is pruned leaves its workers' placement group behind, also the last one, whose CPUs probes need.
        with removed_meanwhile():
            wait_for_probes(run_sweep(sweep, resume=resume), timeout=None if local else PROBE_PATIENCE)
    except (KeyboardInterrupt, RunFailed) as error:
        ended = error
        if not storage.exists(storage.join(sweep.uri, "sweep.json")):
            raise
    outcomes = read_sweep(sweep)
    page = write_summary(sweep, outcomes)
    Console().print(summary_table(sweep, outcomes))
    print(page, flush=True)
    if ended is not None:
        raise ended
    require_none_failed(outcomes)
