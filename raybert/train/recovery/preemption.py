"""Preemption: before a node goes, its run saves a checkpoint and starts again elsewhere.

Ray drains a node when an autoscaler, `ray drain-node` or `raybert.node` says so. Ray Train tells every worker of the
group, and the workers agree on the step after which they leave (`raybert.train.recovery.stop`).
"""

import time

from raybert import storage
from raybert.train.recovery.committed import last_step

LONGEST_WAIT = 120.0  # for the checkpoint to be committed
POLL = 0.2


class Preempted(RuntimeError):  # noqa: N818 - reads as what happened
    """The worker group ends itself after saving a checkpoint."""


def leave(run_uri: str, step: int) -> None:
    """Wait until the checkpoint of this step is committed, then end the group.

    Raises:
        Preempted: always; Ray Train starts the group again on nodes that stay.
    """
    end = time.monotonic() + LONGEST_WAIT
    poll = 10 * POLL if storage.is_remote(run_uri) else POLL
    while time.monotonic() < end:
        try:
            if last_step(run_uri) >= step:
                break
        except (ValueError, OSError):
            pass  # the record is just being written, or storage is away
        time.sleep(poll)
    raise Preempted(f"a node of the worker group is being preempted; a checkpoint was saved at step {step}")
