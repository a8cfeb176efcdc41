"""Ray Train's side of the data path: which stream the worker group gets when it starts."""

from typing import Any

import ray.data
from ray.train import DataConfig

from raybert import storage
from raybert.data.stream import execution_options, train_stream
from raybert.patience import patiently

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


class IngestConfig(DataConfig):
    """Builds the stream when a worker group asks for it: only then are its size and its first step known.

    Ray Train calls `configure` once for every start of the worker group, so a restart, or a resize of an elastic run,
    gets the batches from the restored step on, cut for its own number of workers.
    """

    def __init__(
        self,
        *,
        run_uri: str,
        shards_uri: str,
        manifest: str,
        seed: int,
        global_batch: int,
        steps: int,
        task_cpus: float,
        patience: float,
    ) -> None:
        super().__init__(execution_options=execution_options())
        self._run_uri, self._patience = run_uri, patience
        self._stream: dict[str, Any] = {
            "shards_uri": shards_uri,
            "manifest": manifest,
            "seed": seed,
            "global_batch": global_batch,
            "steps": steps,
            "task_cpus": task_cpus,
            "patience": patience,
        }

    def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        start_step = patiently(
            lambda: last_step(self._run_uri), f"looking into {self._run_uri}", seconds=self._patience
        )
        stream = train_stream(world_size=world_size, start_step=start_step, **self._stream)
        return super().configure(dict.fromkeys(datasets, stream), world_size, *args, **kwargs)


def placeholder(run_uri: str, patience: float) -> ray.data.Dataset:
    """What TorchTrainer is given in place of the stream, which `IngestConfig` builds later.

    Ray Train's controller calls it before each start of the worker group. So here is where the checkpoint that the
    workers are about to restore is compared with its checksums.

    Raises:
        DamagedCheckpoint: its files are not what was written.
    """
    patiently(lambda: _verify_newest(run_uri), f"looking into {run_uri}", seconds=patience)
    return ray.data.range(1)


def _verify_newest(run_uri: str) -> None:
    if step := last_step(run_uri):
        # Here, since Ray Train calls this in an actor of its own, and a new run's need not wait for torch.
        from raybert.train.checkpoint import verify_files

        verify_files(storage.join(run_uri, checkpoint_name(step)))
