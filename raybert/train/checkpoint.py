"""What a checkpoint holds, and how it reaches storage while training goes on.

A checkpoint is a directory: ``model.safetensors``, ``config.json``, ``tokenizer/`` (of another tokenizer than
raybert's own) and, where training can go on from it,
``training_state.pt`` (optimizer and counters; loaded with ``weights_only=True``, so it can hold no code).
The step only waits for a copy of the tensors to main memory; writing is
a background thread's work. On a GPU the copy itself runs beside the next forward and backward pass, and the next update
of the weights waits for what is left of it.
"""

import functools
import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor, nn

from raybert.errors import DamagedCheckpoint, InputError
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.directory import TRAINING_STATE, write_directory
from raybert.model.files import weights, write_tokenizer, write_weights
from raybert.tokenizer import TextTokenizer

STATE_FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """Copies in main memory of all that a checkpoint holds. `state` is None for weights alone."""

    weights: dict[str, Tensor]
    config: BertConfig
    state: dict[str, Any] | None
    tokenizer: TextTokenizer | None = None
    copied: torch.cuda.Event | None = None  # before which the copies are not complete; None: they are

    def wait(self) -> None:
        """Return when the copies are complete."""
        if self.copied is not None:
            self.copied.synchronize()

    def weights_alone(self) -> "Snapshot":
        """The same without what only training needs; the tensors are shared."""
        return Snapshot(self.weights, self.config, None, self.tokenizer, self.copied)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **counters: Any) -> Snapshot:
    """Copy the weights and, with an optimizer, its state and the counters, to main memory.

    On a GPU the copies are under way when this returns, see `Snapshot.wait`. Whoever changes the weights next without
    a `Gate` has to wait as well.
    """
    bert = unwrap(model)
    device = bert.word_embeddings.weight.device
    if device.type != "cuda":
        return _copy(bert, optimizer, counters, None)
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        return _copy(bert, optimizer, counters, torch.cuda.Event())


def _copy(
    bert: Bert, optimizer: torch.optim.Optimizer | None, counters: dict[str, Any], copied: torch.cuda.Event | None
) -> Snapshot:
    state = None
    if optimizer is not None:
        state = {"format": STATE_FORMAT, "optimizer": _to_cpu(optimizer.state_dict()), **counters}
    tensors = weights(bert) if copied is None else _to_cpu(bert.state_dict())
    if copied is not None:
        copied.record()
    return Snapshot(tensors, bert.config, state, bert.tokenizer, copied)


@functools.lru_cache(maxsize=1)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Gate:
    """Has an optimizer's next update wait, on the device, until the newest snapshot holds the weights of before."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._copied: torch.cuda.Event | None = None
        optimizer.register_step_pre_hook(self._wait)

    def hold(self, snap: Snapshot) -> None:
        self._copied = snap.copied

    def _wait(self, *_: Any) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None


def unwrap(model: nn.Module) -> Bert:
    """The encoder inside its losses, DistributedDataParallel and torch.compile."""
    module: Any = model
    while not isinstance(module, Bert):
        module = next(getattr(module, name) for name in ("module", "_orig_mod", "bert") if hasattr(module, name))
    return module


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type == "cuda":
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            return host.copy_(value.detach(), non_blocking=True)
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_cpu(item) for item in value]
    return value


def write(snap: Snapshot, uri: str) -> int:
    """Write the checkpoint directory, whole or not at all, and return its size in bytes."""
    snap.wait()

    def fill(directory: Path) -> None:
        write_tokenizer(snap.tokenizer, directory)
        write_weights(snap.weights, snap.config, directory)
        if snap.state is not None:
            torch.save(snap.state, directory / TRAINING_STATE)

    return write_directory(uri, fill)


def load_state(directory: Path) -> dict[str, Any]:
    """The training state of a local checkpoint directory. No code in it is run.

    Raises:
        DamagedCheckpoint: the file is damaged, or holds more than tensors and numbers.
        InputError: it is missing, or of another format.
    """
    path = directory / TRAINING_STATE
    if not path.exists():
        raise InputError(
            f"{directory} contains only weights; training can resume only from a checkpoint with {path.name}."
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, OSError) as error:
        raise DamagedCheckpoint(
            f"{path} is damaged or not a training state of raybert ({type(error).__name__}); no code in it was "
            "executed. Resume from another checkpoint."
        ) from error
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise DamagedCheckpoint(f"{path} contains a {kind}, not a training state; resume from another checkpoint.")
    if state.get("format") != STATE_FORMAT:
        raise InputError(f"{path} has format {state.get('format')}, but this version reads format {STATE_FORMAT}.")
    return state


class BackgroundWriter:
    """Runs jobs one after the other in a thread. One may wait while one runs; a third makes the caller wait.

    So at most two snapshots exist beside the model, however slow storage is. A job's exception is raised to the caller
    with the next job or at the end.
    """

    def __init__(self) -> None:
        self._jobs: Queue[Callable[[], object] | None] = Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if job is None:
                    return
                job()
            except BaseException as error:
                self._error = error
            finally:
                self._jobs.task_done()

    def submit(self, job: Callable[[], object]) -> None:
        self._raise()
        self._jobs.put(job)

    def drain(self) -> None:
        """Wait until every job that was submitted is done, or has failed; the last upload does after `close`."""
        self._jobs.join()

    def close(self) -> None:
        """Wait until every job is done, and end the thread."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
