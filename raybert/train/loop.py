"""The training loop of one Ray Train worker: from the restored step to the last one."""

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model
from torch import nn

from raybert import storage
from raybert.config import Config, from_mapping
from raybert.data.reader import validation_batches
from raybert.data.shards import open_shards
from raybert.data.stream import ahead, blocks_of, worker_batches
from raybert.data.tensors import to_torch
from raybert.errors import DamagedCheckpoint, InputError
from raybert.model.bert import Bert, flops_per_token
from raybert.model.files import read_weights
from raybert.model.losses import Pretraining
from raybert.model.peak import peak_flops
from raybert.model.precision import pick_dtype
from raybert.probe.tasks import ProbeTask, parse_task
from raybert.storage.retry import patiently
from raybert.telemetry import FAILURE, Gauges, MetricsLog
from raybert.train import checkpoint as checkpoints
from raybert.train import clock
from raybert.train import optimizer as optimizers
from raybert.train.exchange import compress_gradients
from raybert.train.interval import Interval, Streak, Totals
from raybert.train.ledger import Ledger
from raybert.train.recovery import faults, preemption
from raybert.train.recovery.committed import checkpoint_name
from raybert.train.recovery.heartbeat import Pulse
from raybert.train.recovery.stop import StopVote
from raybert.train.saver import Saver
from raybert.train.schedule import lr_at
from raybert.train.start import begin
from raybert.train.step import all_reduce_sums, means, train_step, validate

T = TypeVar("T")

# A run whose loss is so many times that of guessing has diverged.
DIVERGED = 3.0


def train_loop(settings: dict[str, Any]) -> None:
    """Entry point of a worker; `settings` is made by `raybert.train.run`."""
    tasks = [parse_task(task, "the run's settings") for task in settings["tasks"]]
    config = from_mapping(settings["config"])
    if storage.exists(storage.join(config.run_uri, FAILURE)):
        return
    try:
        others = {name: settings[name] for name in ("probe_cpus", "manifest", "token_vectors")}
        worker = Worker(config, tasks=tasks, **others)
    except DamagedCheckpoint:
        raise  # which the driver passes over
    except InputError as error:
        _give_up(config.run_uri, "data", f"Training cannot begin: {error}", step=0)
        raise
    try:
        worker.run()
    finally:
        worker.close()


def _give_up(run_uri: str, kind: str, reason: str, *, step: int) -> None:
    """Note why the run ends. The same would end it again, so no worker begins when this is there."""
    storage.write_json(storage.join(run_uri, FAILURE), {"step": step, "reason": reason, "kind": kind})


class Worker:
    """One rank of the run: its model replica, its part of every batch, and, on rank 0, what is written down."""

    def __init__(
        self, config: Config, *, tasks: list[ProbeTask], probe_cpus: float, manifest: str, token_vectors: str
    ) -> None:
        context = ray.train.get_context()
        self.config = config
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.tasks = tasks
        self.device = get_device()
        self.clock = clock.Clock()
        self.pulse = Pulse(
            config.run_uri,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            clock=self.clock,
            factor=config.train.hang_factor,
            least=config.train.hang_seconds,
            patience=config.run.patience,
        )
        self.blocks = ahead(lambda: blocks_of(ray.train.get_dataset_shard("train")))
        if self.device.type == "cpu":
            # Ray's default for OpenMP follows whole CPUs only; more threads than cores fight each other.
            torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self.dtype = self._agree_on_dtype()
        self.shards = open_shards(config.data.shards, manifest)
        # Of guessing: ln(vocabulary) for a masked token and ln(2) for a pair, which is where training starts.
        self.loss_limit = DIVERGED * (math.log(config.model.bert().vocab_size) + math.log(2))

        torch.manual_seed(config.train.seed)
        bert = Bert(config.model.bert()).to(self.device)
        optimizer_options = config.optimizer.model_dump()
        self.optimizer = optimizers.build(bert, **optimizer_options)
        self.step, self.elapsed = 0, 0.0
        best = self._restore(bert, token_vectors)
        compiled = config.train.compile if config.train.compile != "auto" else self.device.type == "cuda"
        self.counted = self.step  # the step up to which samples are in the counter
        self.model = prepare_model(
            cast(nn.Module, torch.compile(Pretraining(bert))) if compiled else Pretraining(bert),
            parallel_strategy_kwargs={"gradient_as_bucket_view": True},
        )
        if config.train.gradient_exchange == "bfloat16":
            compress_gradients(self.model)
        self.flops_per_token = flops_per_token(bert.config, self.shards.seq_len)
        self.peak = peak_flops(self.device, self.dtype) * self.world_size
        self.validation = self._validation_part()
        self.streak = Streak(config.train.max_bad_steps)
        self.stop_vote = StopVote(config.run_uri, rank=self.rank, world_size=self.world_size)
        self.ledger: Ledger | None = None
        self.log = MetricsLog(config.run_uri) if self.rank == 0 else None
        self.gauges = Gauges(config.run_uri) if self.rank == 0 else None
        self.saver = Saver(
            config,
            model=self.model,
            optimizer=self.optimizer,
            tasks=tasks,
            probe_cpus=probe_cpus,
            rank=self.rank,
            clock=self.clock,
            restored=self.step,
            best=best,
            flush=self._flush,
            gauges=self.gauges,
        )

    # -- set-up -------------------------------------------------------------------------------------------------

    def _agree_on_dtype(self) -> torch.dtype:
        """bfloat16 where it is the choice of every rank."""
        mine = pick_dtype(self.config.train.dtype, self.device)
        agreed = torch.tensor(int(mine == torch.bfloat16), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return torch.bfloat16 if agreed.item() else torch.float32

    def _restore(self, bert: Bert, token_vectors: str) -> float:
        """Begin where the checkpoint ended, if there is one, and return the best validation loss until then."""
        committed = ray.train.get_checkpoint()
        if committed is None:
            begin(bert, self.config, token_vectors)
            return math.inf
        with committed.as_directory() as directory:
            try:
                bert.load_state_dict(read_weights(Path(directory)))
            except InputError as error:
                raise DamagedCheckpoint(str(error)) from error
            state = checkpoints.load_state(Path(directory))
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed_seconds"]
        return float(state["best_validation_loss"])

    def _validation_part(self) -> list[dict[str, Any]]:
        """This rank's part of the validation samples. They are few and always the same, so they are built once."""
        if not self.config.every.validation or not self.shards.rows("validation"):
            return []
        batches = validation_batches(
            self.shards,
            seed=self.config.data.seed,
            batch_size=self.config.train.micro_batch,
            samples=self.config.validation.samples,
        )
        return [batch for index, batch in enumerate(batches) if index % self.world_size == self.rank]

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        config, train = self.config, self.config.train
        if self.step >= train.steps:
            return
        first_micro_batch = self.rank * (train.global_batch // (train.micro_batch * self.world_size))
        if self.step == 0 and config.every.validation:
            self._write(self._validate(), {})
        batches = worker_batches(
            self.blocks,
            rank=self.rank,
            world_size=self.world_size,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            start_step=self.step,
            steps=train.steps,
        )
        # Made here, so that a run which was done already leaves no trace of another start.
        self.ledger = self._patiently(self._open_ledger, "opening the ledger") if self.rank == 0 else None
        if self.gauges is not None and self.ledger is not None:
            self.gauges.set({"restarts": self.ledger.attempt - 1})
        interval = self._new_interval()
        self.clock.done(self.step)
        self.clock.start()
        for step, columns in self._timed(batches):
            micro_batches = [to_torch(part, self.device) for part in columns]
            lr = lr_at(
                step,
                peak_lr=config.optimizer.lr,
                total_steps=train.steps,
                warmup_steps=config.schedule.warmup_steps,
                decay=config.schedule.decay,
                decay_fraction=config.schedule.decay_fraction,
                min_lr_ratio=config.schedule.min_lr_ratio,
            )
            sums, norm = train_step(
                self.model,
                self.optimizer,
                micro_batches,
                lr=lr,
                grad_clip=train.grad_clip,
                dtype=self.dtype,
                seed=train.seed,
                step=step,
                first_micro_batch=first_micro_batch,
                global_batch=train.global_batch,
            )
            interval.add(columns, sums, norm)
            self.step = step + 1
            self.clock.done(self.step)
            stopping, leaving = self.stop_vote.agreed(preemption.noticed())
            # The last checkpoint of this group, whatever the cadence.
            events = self._events() | ({"checkpoint"} if stopping or leaving else set())
            if not events and self.step % config.every.log and self.step < train.steps:
                continue
            totals, interval = interval.close(), self._new_interval()
            self._note(totals)
            record = self._record(totals, lr)
            if (bad := self.streak.reached(totals)) is not None:
                self._stop(self._not_finite(bad, totals))
                return
            if not record.get("loss", 0.0) <= self.loss_limit:
                self._stop(self._diverged(record))
                return
            if "validation" in events:
                record |= self._validate()
            waits = self.clock.lap()
            self._write(record, waits)
            self.saver.save(events, record, tokens=record["samples"] * self.shards.seq_len)
            if stopping:
                break
            if leaving and self.step < train.steps:
                with self.clock.waiting("checkpoint"):
                    preemption.leave(config.run_uri, self.step)
        self._finish()

    def _finish(self) -> None:
        """Wait until all that this start of the group noted lies in storage; no other rank waits for this one now."""
        self.pulse.close()
        if self.ledger is not None:
            self._patiently(self.ledger.flush, "writing the ledger")
        self.saver.close()

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, with the time spent waiting for each one on the clock."""
        while True:
            with self.clock.waiting("data"):
                try:
                    batch = next(batches, None)
                except Exception as error:
                    if text := faults.input_fault(error):
                        reason = f"The data cannot be read at step {self.step + 1}: {text}"
                        _give_up(self.config.run_uri, "data", reason, step=self.step)
                    raise
            if batch is None:
                return
            yield batch

    def _events(self) -> set[str]:
        """What is due after this step. The last step validates, probes and saves whatever the cadence."""
        every, last = self.config.every, self.step == self.config.train.steps
        cadences = {"validation": every.validation, "probe": every.probe, "checkpoint": every.checkpoint}
        if not self.tasks:
            cadences["probe"] = 0
        return {name for name, cadence in cadences.items() if cadence and (last or self.step % cadence == 0)}

    def _record(self, totals: Totals, lr: float) -> dict[str, Any]:
        """A line of the log. Without a single finite step there is nothing to say of losses."""
        seconds = self.clock.since_lap()
        rate = len(totals.norms) * self.config.train.global_batch / seconds
        remaining = self.config.train.steps - self.step
        finite = not all(totals.skipped)
        return {
            "step": self.step,
            **(means(totals.sums) | {"grad_norm": totals.grad_norm} if finite else {}),
            "lr": lr,
            "skipped": sum(totals.skipped),
            "tokens_per_second": totals.tokens / seconds,
            "mfu": totals.tokens / seconds * self.flops_per_token / self.peak,
            "samples": self.step * self.config.train.global_batch,
            "epoch": self.step * self.config.train.global_batch / self.shards.rows("train"),
            "elapsed_seconds": self.elapsed + self.clock.total(),
            "eta_seconds": remaining * self.config.train.global_batch / rate,
            "workers": self.world_size,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _validate(self) -> dict[str, Any]:
        """Validation losses over the fixed samples, every rank scoring a part.

        The machine's limit is measured again as well: at the start of a run others may still be at work on its cores.
        """
        with self.clock.waiting("validation"):
            batches = (to_torch(part, self.device) for part in self._moving(self.validation))
            sums = all_reduce_sums(validate(self.model, batches, self.dtype, self.device), self.world_size)
            self.peak = max(self.peak, peak_flops(self.device, self.dtype, seconds=0.05) * self.world_size)
        if not sums[4] > 0:
            return {}
        found = means(sums)
        if not all(map(math.isfinite, found.values())):
            if self.rank == 0:
                text = f"The validation loss is not finite at step {self.step}."
                faults.note(self.config.run_uri, "validation", text, step=self.step)
            return {}
        return {"step": self.step, "validation": found}

    def _moving(self, batches: list[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            self.clock.progress += 1

    # -- what is written ----------------------------------------------------------------------------------------

    def _patiently(self, action: Callable[[], T], what: str) -> T:
        return patiently(action, f"{what} of {self.config.run_uri}", seconds=self.config.run.patience)

    def _new_interval(self) -> Interval:
        return Interval(self.step + 1, self.device, self.world_size)

    def _open_ledger(self) -> Ledger:
        return Ledger(self.config.run_uri, restored=self.step, workers=self.world_size)

    def _note(self, totals: Totals) -> None:
        if self.ledger is not None:
            noted = partial(self.ledger.add, totals.first, totals.digests, totals.skipped)
            with self.clock.waiting("report"):
                self._patiently(noted, "writing the ledger")

    def _write(self, record: dict[str, Any], waits: dict[str, float]) -> None:
        if self.log is None or self.gauges is None or not record:
            return
        seconds = waits.get("seconds", 0.0)
        shares = {f"wait_{name}": waits[name] / seconds for name in clock.KINDS if seconds}
        with self.clock.waiting("report"):
            self._patiently(partial(self.log.write, {**record, **shares}), "writing the log")
        flat = {"validation_loss": record["validation"]["loss"]} if "validation" in record else {}
        self.gauges.set({**record, **flat})
        counted = {f"wait_{name}_seconds_total": waits.get(name, 0.0) for name in clock.KINDS}
        self.gauges.add({**counted, "samples_total": (self.step - self.counted) * self.config.train.global_batch})
        self.counted = self.step

    def _flush(self) -> None:
        """What was noted until here must lie in storage before a checkpoint is committed that goes on from here."""
        if self.ledger is not None and self.log is not None:
            self._patiently(self.ledger.flush, "writing the ledger")
            self._patiently(self.log.sync, "writing the log")

    def _diverged(self, record: dict[str, Any]) -> str:
        return (
            f"The loss is {record['loss']:.3g} at step {self.step} (lr {record['lr']:.2e}), more than {DIVERGED} times "
            "that where training starts; lower optimizer.lr or raise schedule.warmup_steps, and start again under "
            "another run.name or from the last checkpoint."
        )

    def _not_finite(self, step: int, totals: Totals) -> str:
        batch = self.config.train.global_batch
        kept = self.saver.saved
        checkpoint = f"the last checkpoint is {checkpoint_name(kept)}" if kept else "there is no checkpoint yet"
        return (
            f"The gradient was not finite for train.max_bad_steps={self.config.train.max_bad_steps} steps in a row, up "
            f"to step {step} (samples {(step - 1) * batch} to {step * batch - 1}, batch digest "
            f"{totals.digests[step - totals.first]:016x}); {checkpoint}, and no update was made since. Lower "
            "optimizer.lr, raise schedule.warmup_steps or set train.dtype=float32, and start again under another "
            "run.name or from that checkpoint."
        )

    def _stop(self, reason: str) -> None:
        self._finish()
        if self.rank == 0:
            _give_up(self.config.run_uri, "diverged", reason, step=self.step)

    def close(self) -> None:
        self.pulse.close()
        self.stop_vote.close()
        if self.log is not None:
            self._patiently(self.log.close, "writing the log")
