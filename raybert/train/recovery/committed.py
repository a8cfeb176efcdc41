"""Which checkpoints of a run count: those that Ray Train has committed."""

from raybert import storage

CHECKPOINTS = "checkpoints"
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's record of what was committed


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint inside the run directory."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def last_step(run_uri: str) -> int:
    """Step of the newest checkpoint that was committed; 0 for a run that has none.

    Ray Train's own record is asked, since a directory may have been left by an upload that was cut off.
    """
    record = storage.join(run_uri, SNAPSHOT)
    if not storage.exists(record):
        return 0
    latest = storage.read_json(record)["latest_checkpoint_result"]
    return int(latest["checkpoint_dir_name"].rpartition("-")[2]) if latest else 0
