"""Ray Train's side of the data path: which stream the worker group gets when it starts."""

from typing import Any

import ray.data
from ray.train import DataConfig

from raybert import storage
from raybert.data.stream import StreamSpec, execution_options, train_stream
from raybert.model.directory import verify_files
from raybert.storage.retry import retry
from raybert.train.recovery.committed import checkpoint_name, last_step


class IngestConfig(DataConfig):
    """Builds the stream when a worker group asks for it: only then are its size and its first step known.

    Ray Train calls `configure` once for every start of the worker group, so a restart, or a resize of an elastic run,
    gets the batches from the restored step on, cut for its own number of workers.
    """

    def __init__(self, run_uri: str, spec: StreamSpec) -> None:
        super().__init__(execution_options=execution_options())
        self._run_uri, self._spec = run_uri, spec

    def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        start_step = retry(
            lambda: last_step(self._run_uri), f"reading {self._run_uri}", seconds=self._spec.retry_seconds
        )
        stream = train_stream(self._spec, world_size=world_size, start_step=start_step)
        return super().configure(dict.fromkeys(datasets, stream), world_size, *args, **kwargs)


def placeholder(run_uri: str, retry_seconds: float) -> ray.data.Dataset:
    """What TorchTrainer is given in place of the stream, which `IngestConfig` builds later.

    Ray Train's controller calls it before each start of the worker group. So here is where the checkpoint that the
    workers are about to restore is compared with its checksums.

    Raises:
        DamagedCheckpoint: its files are not what was written.
    """
    retry(lambda: _verify_newest(run_uri), f"reading {run_uri}", seconds=retry_seconds)
    return ray.data.range(1)


def _verify_newest(run_uri: str) -> None:
    if step := last_step(run_uri):
        verify_files(storage.join(run_uri, checkpoint_name(step)))
