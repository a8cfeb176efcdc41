"""RUN/checkpoints/best where a probe says which weights are the best."""

import shutil
from pathlib import Path

from raybert import storage
from raybert.errors import DamagedCheckpoint
from raybert.model.directory import CONFIG, SUMS, WEIGHTS, verify_files, write_directory
from raybert.probe import metrics
from raybert.probe.service import queue
from raybert.probe.service.queue import Entry


class BestWeights:
    """Keeps a run's best weights. All that it knows lies in storage: the records, and the weights of what is queued."""

    def __init__(self, run_uri: str) -> None:
        self._run_uri, self._metric = run_uri, ""
        self._known: dict[str, tuple[int, float] | None] = {}  # by a record's file: step and metric

    def keep(self, entry: Entry) -> None:
        """Copy the weights of an entry whose tasks all have their records, if no other step's are better.

        Of two steps that are equally good the earlier one is kept, and the start (step 0) never is. Called again, it
        does the same again.
        """
        if not entry.best or entry.step == 0:
            return
        if entry.best != self._metric:
            self._metric, self._known = entry.best, {}
        for name, record in queue.records(self._run_uri, self._known).items():
            found = metrics.value(self._metric, record)
            self._known[name] = (record["step"], found) if found is not None and record["step"] > 0 else None
        reached = [one for one in self._known.values() if one is not None]
        step, _ = max(reached, key=lambda one: (one[1], -one[0]), default=(0, 0.0))
        if step == entry.step:
            _copy(entry.weights, storage.join(self._run_uri, "checkpoints", "best"))


def _copy(weights: str, target: str) -> None:
    """Copy a directory of weights, complete or not at all."""
    try:
        verify_files(weights, required=(CONFIG, WEIGHTS))
    except DamagedCheckpoint:  # a service that was killed had begun to remove them, so it had copied them
        return
    names = [name for _, name in storage.find_files(weights) if name != SUMS]
    with storage.local_copy(weights, names) as source:

        def fill(directory: Path) -> None:
            for name in names:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, directory / name)

        write_directory(target, fill)
