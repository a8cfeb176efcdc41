"""Trackers: a run's figures and probes in TensorBoard, MLflow or Weights & Biases, from what the run directory records.

They are told of `metrics.jsonl` and the probe records in threads of the driver, so no training step ever waits for one,
and one that fails is left out with a warning while training goes on.

    tensorboard   RUN/tensorboard, rewritten from the whole log at every start of the driver
    mlflow        MLFLOW_TRACKING_URI, or RUN/mlflow.db on this machine: mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db
    wandb         online when logged in, else offline in RUN/wandb: wandb sync RUN/wandb/offline-run-*
"""

import hashlib
import logging
import netrc
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from raybert import storage
from raybert.config import Config
from raybert.errors import one_line
from raybert.model.objective import TITLES
from raybert.probe import kinds
from raybert.records import is_number, read_object
from raybert.report.watch import Subscriber, watching

logger = logging.getLogger(__name__)

Name = Literal["tensorboard", "mlflow", "wandb"]  # as `raybert.config` takes them
CURSOR = "trackers.json"  # what MLflow and W&B were told already: they cannot be rewritten
UPLOAD_INTERVAL = 30.0  # seconds between two copies of a growing file to a bucket
FLUSH_INTERVAL = 5.0  # seconds between two times that TensorBoard's file is written out
_cursor_file = threading.Lock()  # each tracker is told in a thread of its own, and all share one file
_OF_TRAINING = {"loss", "lr", "grad_norm", "epoch"} | {
    f"{name}_{kind}" for name in TITLES for kind in ("loss", "accuracy")
}


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...

    def flush_if_due(self) -> None:
        """Called now and then between figures, for what has to be sent on; most trackers do that by themselves."""


@contextmanager
def following(config: Config) -> Iterator[None]:
    """Send the trackers what the run records inside the ``with``, and what they missed before."""
    with opened(config) as subscribers:
        if not subscribers:
            yield
            return
        with watching(config.run_uri, subscribers):
            yield


@contextmanager
def opened(config: Config) -> Iterator[list[Subscriber]]:
    """The run's trackers as subscribers of `raybert.report.watch`; they are closed at the end."""
    run_uri, settings = config.run_uri, flatten(config.model_dump(mode="json"))
    open_ones = [_HarmlessTracker(name, run_uri, settings) for name in config.run.trackers]
    try:
        yield [one.subscriber() for one in open_ones]
    finally:
        for one in open_ones:
            one.close()


class _HarmlessTracker:
    """A tracker that is told everything once, and that does no harm when it fails."""

    def __init__(self, name: Name, run_uri: str, settings: Mapping[str, Any]) -> None:
        self._name, self._cursor = name, _Cursor(name, run_uri)
        self._tracker: Tracker | None = None
        with self._disabled_on_error():
            self._tracker = _OPEN[name](run_uri, settings)

    def subscriber(self) -> Subscriber:
        return Subscriber(
            f"tracker {self._name}",
            on_record=lambda record: self._tell(record["step"], figures(record)),
            on_probe=lambda record: self._tell(record["step"], probe_figures(record), record["task"]),
            on_look=self._flush_if_due,
            history=True,
        )

    def _tell(self, step: int, values: Mapping[str, float], probe: str = "") -> None:
        with self._disabled_on_error():
            if self._tracker is not None and values and self._cursor.is_new(step, probe):
                self._tracker.log(step, values)

    def _flush_if_due(self) -> None:
        with self._disabled_on_error():
            if self._tracker is not None:
                self._tracker.flush_if_due()

    def close(self) -> None:
        with self._disabled_on_error():
            if self._tracker is not None:
                self._tracker.close()
                self._cursor.save()

    @contextmanager
    def _disabled_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            text = one_line(error)
            logger.warning("The tracker %s failed and is disabled until the run is resumed: %s", self._name, text)


class _Cursor:
    """Up to which step, and for which probes, a tracker has been told. TensorBoard begins anew at every start."""

    def __init__(self, name: Name, run_uri: str) -> None:
        self._name, self._uri, self._saved = name, storage.join(run_uri, CURSOR), time.monotonic()
        known: Any = self._read().get(name) if name != "tensorboard" else None
        try:
            self._step, self._probes = int(known["step"]), list(known["probes"])
        except (TypeError, KeyError, ValueError):  # nothing yet; or it is damaged, and the tracker is told all again
            self._step, self._probes = -1, []

    def _read(self) -> dict[str, Any]:
        with suppress(FileNotFoundError, ValueError):
            return read_object(self._uri)
        return {}

    def is_new(self, step: int, probe: str) -> bool:
        """True once for every step and every probe: what a restarted run does again is the same again."""
        key = f"{probe}-{step}"
        if (key in self._probes) if probe else (step <= self._step):
            return False
        if probe:
            self._probes.append(key)
        else:
            self._step = step
        if time.monotonic() - self._saved > UPLOAD_INTERVAL:
            self.save()
        return True

    def save(self) -> None:
        if self._name != "tensorboard":
            self._saved = time.monotonic()
            mine = {self._name: {"step": self._step, "probes": self._probes}}
            with _cursor_file:
                storage.write_json(self._uri, self._read() | mine)


# -- figures ------------------------------------------------------------------------------------------------------


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl under the trackers' names: train/..., validation/..., machine/..."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": float(number) for name, number in value.items() if is_number(number)}
        elif key != "step" and is_number(value):
            found[f"{'train' if key in _OF_TRAINING else 'machine'}/{key}"] = float(value)
    return found


def probe_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The headlines of a probe and of its baselines, with C = 1 and with C tuned, and gains: probe/TASK/..."""
    kind = kinds.of_record(record)
    if record.get("status", "done") != "done" or kind is None:
        return {}
    baselines = record.get("baselines", {})
    found = dict(record) | {name: baselines.get(name) for name in kinds.BASELINES}
    for which in ("untrained", "start"):
        found |= {f"{name}_{which}": score for name, score in baselines.get(which, {}).items()}
    values: dict[str, float] = {}
    for name, score in found.items():
        headline = kind.headline.of(score)
        if headline is not None:
            values[name] = headline
            for key, suffix in (("tuned_accuracy", "tuned"), ("tuned_c", "tuned_c")):
                if is_number(score.get(key)):
                    values[f"{name}_{suffix}"] = float(score[key])
    for name, gain in record.get("beyond_start", {}).items():
        values[f"{name}_gain"] = float(gain["difference"])
    return {f"probe/{record['task']}/{name}": value for name, value in values.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


# -- trackers -----------------------------------------------------------------------------------------------------


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard; of a remote run they are written here and copied there as they grow.

    A file that cannot be written, since the disk is full, is given up; a new one is begun when there is room, and what
    came in between is left out. (tensorboardX's `SummaryWriter` has a thread that ends with the first such error, and
    whoever hands it one more event waits forever.)
    """

    def __init__(self, run_uri: str, settings: Mapping[str, Any]) -> None:
        from tensorboardX.summary import text

        self._uri = storage.join(run_uri, "tensorboard")
        self._remote = storage.is_remote(run_uri)
        self._copied = time.monotonic()
        storage.remove(self._uri)
        self._directory = tempfile.mkdtemp(prefix="raybert-tensorboard-") if self._remote else self._uri
        self._file: Any = None
        self._files, self._flushed, self._is_full = 0, 0.0, False
        rows = [f"| {key} | {value} |" for key, value in settings.items()]
        self._write(0, [text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        self._write(step, [scalar(name, value) for name, value in values.items()])

    def flush_if_due(self) -> None:
        if self._file is not None and time.monotonic() - self._flushed > FLUSH_INTERVAL:
            self._flush()
        if self._remote and time.monotonic() - self._copied > UPLOAD_INTERVAL:
            self._copied = time.monotonic()
            try:
                _upload(self._directory, self._uri)
            except Exception as error:
                logger.warning("Cannot copy TensorBoard's files to %s; retrying: %s", self._uri, error)

    def _write(self, step: int, summaries: Sequence[Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with self._unless_full():
            if self._file is None:
                if self._is_full and time.monotonic() - self._flushed < FLUSH_INTERVAL:
                    return
                self._begin()
            for summary in summaries:
                self._file.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _begin(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        self._flushed = time.monotonic()
        Path(self._directory).mkdir(parents=True, exist_ok=True)
        file = EventsWriter(f"{self._directory}/events", f".{self._files}")
        try:
            file.flush()  # only that finds out whether there is room
        except OSError:
            for path in Path(self._directory).glob(f"events.*.{self._files}"):
                path.unlink()
            raise
        self._file, self._files, self._is_full = file, self._files + 1, False

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        with self._unless_full():
            self._file.flush()

    @contextmanager
    def _unless_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._is_full:
                logger.warning("Cannot write TensorBoard's file; starting another one when possible: %s", error)
            self._file, self._is_full = None, True

    def close(self) -> None:
        with self._unless_full():
            if self._file is not None:
                self._file.close()
        if self._remote:
            try:
                _upload(self._directory, self._uri)
            finally:
                shutil.rmtree(self._directory, ignore_errors=True)


class MLflow(Tracker):
    """An MLflow run in the experiment `raybert`; a resumed run continues its MLflow run."""

    def __init__(self, run_uri: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
        database = storage.join(run_uri, "mlflow.db")
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "raybert")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        mine = self._client.search_runs([experiment_id], f"tags.`raybert.run` = '{run_uri}'")
        if mine:
            self._run = mine[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(experiment_id, run_name=run_uri.rpartition("/")[2]).info.run_id
            params = [Param(key, str(value)[:6000]) for key, value in settings.items()]
            self._client.log_batch(self._run, params=params, tags=[RunTag("raybert.run", run_uri)])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WeightsAndBiases(Tracker):
    """A W&B run in the project of WANDB_PROJECT, or `raybert`; its id is made of the run directory's name."""

    def __init__(self, run_uri: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._remote, self._uri = storage.is_remote(run_uri), storage.join(run_uri, "wandb")
        self._directory = tempfile.mkdtemp(prefix="raybert-wandb-") if self._remote else run_uri
        mode: Any = os.environ.get("WANDB_MODE") or (None if _logged_in_to_wandb() else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "raybert"),
            name=run_uri.rpartition("/")[2],
            id=hashlib.sha256(run_uri.encode()).hexdigest()[:12],
            resume="allow",
            dir=self._directory,
            mode=mode,
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Probes come later than the steps that they belong to: W&B's own counter would refuse them.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        import wandb

        self._run.finish()
        if self._run.offline:
            wandb.teardown()  # its own process writes the file some 0.1 s later, and is waited for only here
        if self._remote:
            if self._run.offline:
                _upload(str(Path(self._directory, "wandb")), self._uri)
            shutil.rmtree(self._directory, ignore_errors=True)


def _logged_in_to_wandb() -> bool:
    """A key in the environment, or where `wandb login` puts it. Without one W&B would ask, or fail."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


_OPEN: Mapping[Name, Any] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}


def _upload(directory: str, uri: str) -> None:
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file() and not path.is_symlink():
            storage.upload_file(path, storage.join(uri, path.relative_to(directory).as_posix()))
