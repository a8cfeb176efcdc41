"""Which checkpoints of a run count: those that Ray Train has committed."""

from raybert import storage
from raybert.errors import InputError
from raybert.ray_internals.names import SNAPSHOT
from raybert.records import read_object

CHECKPOINTS = "checkpoints"


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint inside the run directory."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def last_step(run_uri: str) -> int:
    """Step of the newest checkpoint that was committed; 0 for a run that has none.

    Ray Train's own record is asked, since a directory may have been left by an upload that was cut off.

    Raises:
        InputError: the record is damaged; a resumed run rebuilds it.
    """
    record = storage.join(run_uri, SNAPSHOT)
    if not storage.exists(record):
        return 0
    try:
        latest = read_object(record)["latest_checkpoint_result"]
        return int(latest["checkpoint_dir_name"].rpartition("-")[2]) if latest else 0
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{record}, the list of checkpoints, is damaged: {error}") from error
