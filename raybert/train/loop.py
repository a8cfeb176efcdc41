"""The training loop of one Ray Train worker: from the restored step to the last one."""

import math
import os
from collections.abc import Iterator
from typing import Any

import ray.train
import torch
from ray.train.torch import get_device

from raybert import storage
from raybert.config import Config, from_mapping
from raybert.data.block import Columns
from raybert.data.reader import validation_batches
from raybert.data.shards import open_shards
from raybert.data.spec import sample_spec
from raybert.data.stream import ahead, blocks_of, worker_batches
from raybert.errors import DamagedCheckpoint, InputError
from raybert.model.peak import peak_flops
from raybert.model.schedule import lr_at
from raybert.probe.kind import ProbeTask
from raybert.probe.tasks import parse_task
from raybert.ray_internals.train import preemption_noticed
from raybert.records import FAILURE
from raybert.train import clock, gpu_memory
from raybert.train.feed import PADDED, Feed, choose_packing
from raybert.train.flops import run_flops_per_token
from raybert.train.interval import Interval, Streak, Totals
from raybert.train.recorder import Recorder
from raybert.train.recovery import faults, preemption
from raybert.train.recovery.committed import checkpoint_name
from raybert.train.recovery.heartbeat import Pulse
from raybert.train.recovery.stop import StopVote
from raybert.train.replica import all_agree, build_replica
from raybert.train.saver import Saver
from raybert.train.step import COUNT, all_reduce_sums, means, train_step, validate, warm_up

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
        _give_up(config.run_uri, "data", f"Training cannot start: {error}", step=0)
        raise
    except RuntimeError as error:
        if gpu_memory.exhausted(error):  # the next start would find the GPU as small
            _give_up(config.run_uri, "memory", gpu_memory.sentence(error, config, step=1), step=0)
        raise
    try:
        worker.run()
    except RuntimeError as error:
        if gpu_memory.exhausted(error):
            sentence = gpu_memory.sentence(error, config, step=worker.step + 1)
            _give_up(config.run_uri, "memory", sentence, step=worker.step)
        raise
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
        self.config, self.tasks = config, tasks
        self.objective = config.objective.objective()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device, self.clock = get_device(), clock.Clock()
        self.pulse = self._start_pulse()
        self.blocks = ahead(lambda: blocks_of(ray.train.get_dataset_shard("train")))
        if self.device.type == "cpu":
            # Ray's default for OpenMP follows whole CPUs only; more threads than cores fight each other.
            torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self.shards = open_shards(config.data.shards, manifest)
        self.samples = sample_spec(config, self.shards.vocabulary)
        self.replica = build_replica(config, self.device, self.world_size, token_vectors, self.shards)
        self.step = self.replica.restored.step
        self.feed = self._make_feed()
        guessing = self.objective.loss_by_chance(self.replica.bert.vocab_size, config.train.micro_batch)
        self.loss_limit = DIVERGED * guessing
        self.peak = peak_flops(self.device, self.replica.dtype) * self.world_size
        self.validation = self._validation_part()
        self.streak = Streak(config.train.max_bad_steps)
        self.stop_vote = StopVote(config.run_uri, rank=self.rank, world_size=self.world_size)
        self.recorder = Recorder(
            config, rank=self.rank, world_size=self.world_size, restored=self.step, clock=self.clock
        )
        self.saver = Saver(
            config,
            model=self.replica.model,
            optimizer=self.replica.optimizer,
            tasks=tasks,
            probe_cpus=probe_cpus,
            rank=self.rank,
            clock=self.clock,
            restored=self.step,
            best=self.replica.restored.best,
            flush=self.recorder.flush,
            gauges=self.recorder.gauges,
        )

    def _make_feed(self) -> Feed:
        train, bert = self.config.train, self.replica.bert
        packing, fallback = choose_packing(
            train.packing,
            micro_batch=train.micro_batch,
            seq_len=self.shards.seq_len,
            spec=self.samples,
            device=self.device,
            dtype=self.replica.dtype,
            head_size=bert.hidden_size // bert.num_attention_heads,
        )
        if not all_agree(packing is not None, self.device, self.world_size) and packing is not None:
            packing, fallback = None, f"{PADDED}: another worker has no kernel for packed texts."
        for kind, sentence in (("padding", fallback), ("compiler", self.replica.uncompiled)):
            if sentence and self.rank == 0:
                faults.note(self.config.run_uri, kind, sentence, step=self.step)
        return Feed(self.device, self.samples, packing)

    def _start_pulse(self) -> Pulse:
        train = self.config.train
        return Pulse(
            self.config.run_uri,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            clock=self.clock,
            factor=train.hang_factor,
            least=train.hang_seconds,
            patience=self.config.run.patience,
        )

    def _validation_part(self) -> list[dict[str, Any]]:
        """This rank's part of the validation samples. They are few and always the same, so they are built once."""
        if not self.config.every.validation or not self.shards.rows("validation"):
            return []
        batches = validation_batches(
            self.shards,
            seed=self.config.data.seed,
            batch_size=self.config.train.micro_batch,
            samples=self.config.validation.samples,
            spec=self.samples,
        )
        return [batch for index, batch in enumerate(batches) if index % self.world_size == self.rank]

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the last step, or until the run is asked to stop or has diverged."""
        if self.step >= self.config.train.steps:
            return
        if self.step == 0:
            self.saver.probe_start()
        self._warm_up()
        if self.step == 0 and self.config.every.validation:
            self.recorder.log(self._validate(), {})
        self.recorder.open_ledger()
        interval = self._new_interval()
        self.clock.done(self.step)
        self.clock.start()
        for step, columns in self._timed(self._batches()):
            lr = self._train(step, columns, interval)
            stopping, leaving = self.stop_vote.agreed(preemption_noticed())
            events = self._events(final=stopping or leaving)
            if not self._ends_interval(events):
                continue
            if reason := self._close_interval(interval, events, lr):
                self._give_up_diverged(reason)
                return
            interval = self._new_interval()
            if stopping:
                break
            if leaving and self.step < self.config.train.steps:
                with self.clock.waiting("checkpoint"):
                    preemption.leave(self.config.run_uri, self.step)
        self._finish()

    def _warm_up(self) -> None:
        """Compile every shape that is known: one that is first met in mid-run would look like a hang."""
        replica, validation = self.replica, bool(self.config.every.validation)
        if not replica.compiles:
            return
        # Where nothing is packed validation's first samples stand for all. Training has other shapes if they are fewer
        # than a micro-batch, or if the masked fraction changes.
        for group in self.feed.rungs() or self.feed.send(self.validation[:1]):
            warm_up(replica.model, group, replica.dtype, self.objective, validation=validation)
            self.clock.progress += 1

    def _batches(self) -> Iterator[Any]:
        return worker_batches(
            self.blocks,
            rank=self.rank,
            world_size=self.world_size,
            global_batch=self.config.train.global_batch,
            micro_batch=self.config.train.micro_batch,
            start_step=self.step,
            steps=self.config.train.steps,
        )

    def _train(self, step: int, columns: list[Columns], interval: Interval) -> float:
        """One optimizer step, added to the interval. Returns its learning rate."""
        config, train = self.config, self.config.train
        lr = lr_at(
            step,
            peak_lr=config.optimizer.lr,
            total_steps=train.steps,
            warmup_steps=config.warmup_steps,
            decay=config.schedule.decay,
            decay_fraction=config.schedule.decay_fraction,
            min_lr_ratio=config.schedule.min_lr_ratio,
        )
        sums, norm = train_step(
            self.replica.model,
            self.replica.optimizer,
            self.feed(columns),
            lr=lr,
            grad_clip=train.grad_clip,
            dtype=self.replica.dtype,
            seed=train.seed,
            step=step,
            first_micro_batch=self.rank * (train.global_batch // (train.micro_batch * self.world_size)),
            global_batch=train.global_batch,
            objective=self.objective,
        )
        interval.add(columns, sums, norm)
        self.step = step + 1
        self.clock.done(self.step)
        return lr

    def _close_interval(self, interval: Interval, events: set[str], lr: float) -> str:
        """Add the interval up over the ranks, write it down, and do what is due after its last step.

        Returns:
            Why training must end here, if it must.
        """
        totals = interval.close()
        self.recorder.note(totals)
        record = self._record(totals, lr)
        if reason := self._diverged(totals, record):
            return reason
        if "validation" in events:
            record |= self._validate()
        self.recorder.log(record, self.clock.lap())
        self.saver.save(events, record, tokens=record["samples"] * self.shards.seq_len)
        return ""

    def _finish(self) -> None:
        """Wait until all that this start of the group noted lies in storage; no other rank waits for this one now."""
        self.pulse.close()
        self.recorder.flush()
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

    def _events(self, *, final: bool) -> set[str]:
        """What is due after this step. The last step validates, probes and saves whatever the cadence.

        Args:
            final: the group ends after this step, at least with a checkpoint.
        """
        every, last = self.config.every, self.step == self.config.train.steps
        cadences = {"validation": every.validation, "probe": every.probe, "checkpoint": every.checkpoint}
        if not self.tasks:
            cadences["probe"] = 0
        due = {name for name, cadence in cadences.items() if cadence and (last or self.step % cadence == 0)}
        return due | {"checkpoint"} if final else due

    def _ends_interval(self, events: set[str]) -> bool:
        train, every = self.config.train, self.config.every
        return bool(events) or self.step % every.log == 0 or self.step >= train.steps

    def _new_interval(self) -> Interval:
        return Interval(self.step + 1, self.objective, self.device, self.world_size)

    def _record(self, totals: Totals, lr: float) -> dict[str, Any]:
        """A line of the log. Without a single finite step there is nothing to say of losses."""
        seconds = self.clock.since_lap()
        rate = len(totals.norms) * self.config.train.global_batch / seconds
        remaining = self.config.train.steps - self.step
        finite = not all(totals.skipped)
        samples = self.step * self.config.train.global_batch
        flops = run_flops_per_token(self.config, self.shards.seq_len, samples - 1)
        return {
            "step": self.step,
            **(means(totals.sums, self.objective) | {"grad_norm": totals.grad_norm} if finite else {}),
            "lr": lr,
            "skipped": sum(totals.skipped),
            "tokens_per_second": totals.tokens / seconds,
            "mfu": totals.tokens / seconds * flops / self.peak,
            "samples": samples,
            "epoch": samples / self.shards.rows("train"),
            "elapsed_seconds": self.replica.restored.elapsed + self.clock.total(),
            "eta_seconds": remaining * self.config.train.global_batch / rate,
            "workers": self.world_size,
            "dtype": str(self.replica.dtype).removeprefix("torch."),
            **self.feed.lap(),
        }

    def _validate(self) -> dict[str, Any]:
        """Validation losses over the fixed samples, every rank scoring a part.

        A CPU's limit is measured again as well: at the start of a run others may still be at work on its cores.
        """
        with self.clock.waiting("validation"):
            batches = (group for part in self._counting_progress(self.validation) for group in self.feed.send([part]))
            sums = validate(self.replica.model, batches, self.replica.dtype, self.device, self.objective)
            sums = all_reduce_sums(sums, self.world_size)
            if self.device.type == "cpu":
                peak = peak_flops(self.device, self.replica.dtype, seconds=0.05) * self.world_size
                self.peak = max(self.peak, peak)
        if not sums[COUNT] > 0:
            return {}
        found = means(sums, self.objective)
        if not all(map(math.isfinite, found.values())):
            if self.rank == 0:
                text = f"The validation loss is not finite at step {self.step}."
                faults.note(self.config.run_uri, "validation", text, step=self.step)
            return {}
        return {"step": self.step, "validation": found}

    def _counting_progress(self, batches: list[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            self.clock.progress += 1

    # -- the end ------------------------------------------------------------------------------------------------

    def _diverged(self, totals: Totals, record: dict[str, Any]) -> str:
        """Why nothing good can come of further steps; empty while all is well."""
        if (bad := self.streak.reached(totals)) is not None:
            return self._not_finite(bad, totals)
        return "" if record.get("loss", 0.0) <= self.loss_limit else self._too_high(record)

    def _too_high(self, record: dict[str, Any]) -> str:
        return (
            f"The loss is {record['loss']:.3g} at step {self.step} (lr {record['lr']:.2e}), more than {DIVERGED} "
            "times the loss at the start; lower optimizer.lr or raise schedule.warmup_steps, and train again "
            "with another run.name or from the last checkpoint."
        )

    def _not_finite(self, step: int, totals: Totals) -> str:
        batch = self.config.train.global_batch
        kept = self.saver.saved
        checkpoint = f"the last checkpoint is {checkpoint_name(kept)}" if kept else "there is no checkpoint yet"
        return (
            f"The gradient was not finite for train.max_bad_steps={self.config.train.max_bad_steps} steps in a "
            f"row, up to step {step} (samples {(step - 1) * batch} to {step * batch - 1}, batch digest "
            f"{totals.digests[step - totals.first]:016x}); {checkpoint}, and the updates of these steps were "
            "skipped. Lower optimizer.lr, raise schedule.warmup_steps or set train.dtype=float32, and train "
            "again with another run.name or from that checkpoint."
        )

    def _give_up_diverged(self, reason: str) -> None:
        self._finish()
        if self.rank == 0:
            _give_up(self.config.run_uri, "diverged", reason, step=self.step)

    def close(self) -> None:
        self.pulse.close()
        self.stop_vote.close()
        self.recorder.close()
