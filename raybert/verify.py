"""`raybert verify RUN`: does what lies in a run's directory, and the shards it names, still fit together?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from raybert import config as configs
from raybert import storage
from raybert.data.block import take
from raybert.data.reader import SampleReader
from raybert.data.shards import ShardSet, open_shards, verify_shards
from raybert.data.spec import sample_spec
from raybert.errors import InputError
from raybert.model.directory import REQUIRED, verify_files
from raybert.model.files import CONFIG, WEIGHTS, load
from raybert.report.read import CONFIG as CONFIG_FILE
from raybert.report.read import RunData, read_run, read_settings
from raybert.tokenizer.files import own_or
from raybert.train.ledger import digest, read_account
from raybert.train.recovery.committed import last_step
from raybert.train.recovery.faults import FAULTS, read_faults
from raybert.train.recovery.repair import DAMAGED, incomplete_checkpoints

CHECKED_SAMPLES = 4096  # built at once when the ledger is computed again


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fault` is empty when it is in order."""

    subject: str
    fault: str
    detail: str = ""


def verify(run_uri: str) -> Iterator[Finding]:
    """Look at the settings, the shards (every hash), the checkpoints (every tensor), the log and the probes.

    A file that cannot be read is a finding of its own.

    Raises:
        InputError: `run_uri` is not a run directory.
    """
    run = read_run(run_uri)
    found: dict[str, Any] = {}

    def settings() -> str:
        read_settings(run.uri)
        found["config"] = configs.load(storage.join(run.uri, "config.yaml"))
        return f"{run.steps_done:,} of {run.steps_planned:,} steps done"

    def shards() -> str:
        found["shards"] = open_shards(found["config"].data.shards)
        if found["shards"].manifest_hash != run.about.get("manifest"):
            raise InputError(f"{found['shards'].uri} is not the shard set that this run was trained on.")
        verify_shards(found["shards"])
        return f"{found['shards'].rows('train'):,} training windows, all hashes match the manifest"

    yield _run_check("settings", settings)
    yield from (Finding(part.file, part.fault) for part in run.left_out if part.file != CONFIG_FILE)
    for name, fault in read_faults(run.uri)[1].items():
        yield Finding(f"{FAULTS}/{name}", f"cannot be read: {fault}")
    if "config" not in found:
        return
    yield _run_check("shards", shards)
    cut_short = set(incomplete_checkpoints(run.uri))
    for uri in storage.list_dir(storage.join(run.uri, "checkpoints")):
        if uri in cut_short:
            said = (
                "incomplete and not listed: being written or deleted, or left by an interrupted write; no run "
                "resumes from it"
            )
            yield Finding(uri.rpartition("/")[2], "", said)
        elif not uri.rpartition("/")[2].startswith((".", DAMAGED)):
            yield _run_check(uri.rpartition("/")[2], partial(_checkpoint, uri, found["config"], found.get("shards")))
    yield _run_check("log", partial(_log, run, found["config"]))
    yield _run_check("ledger", partial(_ledger, run, found["config"], found.get("shards")))
    for task in run.tasks:
        yield _run_check(f"probes of {task}", partial(_probes, run, task))


def _run_check(subject: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, "", check())
    except (InputError, OSError) as error:
        return Finding(subject, str(error) or type(error).__name__)
    except Exception as error:  # what is damaged makes any code fail that believes it
        return Finding(subject, f"the check failed ({type(error).__name__}: {error})")


def _checkpoint(uri: str, config: configs.Config, shards: ShardSet | None) -> str:
    verify_files(uri, REQUIRED if uri.rpartition("/")[2].startswith("step-") else (CONFIG, WEIGHTS))
    model = load(uri)
    if model.config != config.model.bert():
        raise InputError(f"The checkpoint {uri} does not match the model in the run's settings.")
    if shards is not None and own_or(model.tokenizer).hash != shards.tokenizer_hash:
        raise InputError(f"The checkpoint {uri} has another tokenizer than the run's shards.")
    return f"{sum(p.numel() for p in model.parameters()):,} parameters"


def _log(run: RunData, config: configs.Config) -> str:
    """Every step that should have been logged was, with the samples that the plan gives it."""
    batch = config.train.global_batch
    logged = {record["step"]: record for record in run.records if "samples" in record}
    first = run.cadences - run.cadences % config.every.log + config.every.log
    # The log is in storage before a checkpoint is committed, so one that ends before the newest was cut off.
    due = range(first, max(run.steps_done, last_step(run.uri)) + 1, config.every.log)
    # Not a list of them: a damaged step may be any number.
    if missing := len(due) - sum(step in due for step in logged):
        step = next(step for step in due if step not in logged)
        raise InputError(f"metrics.jsonl lacks step {step} ({missing} steps in all).")
    for step, record in logged.items():
        if record["samples"] != step * batch:
            raise InputError(f"metrics.jsonl has {record['samples']} samples at step {step}, not {step * batch}.")
    return f"{len(logged):,} logged steps, {len(run.restarts)} restarts"


def _ledger(run: RunData, config: configs.Config, shards: ShardSet | None) -> str:
    """The ledger covers every step up to the newest checkpoint, and the shards give the same digest for each."""
    account = read_account(run.uri)
    steps, due = len(account.digests), last_step(run.uri)
    if steps < due:
        raise InputError(f"The ledger ends at step {steps}, but there is a checkpoint of step {due}.")
    if shards is None:
        raise InputError(f"The {steps:,} steps of the ledger cannot be checked without the shards.")
    batch, at_once = config.train.global_batch, max(1, CHECKED_SAMPLES // config.train.global_batch)
    reader = SampleReader(shards, seed=config.data.seed, spec=sample_spec(config, shards.vocabulary))
    for start in range(0, steps, at_once):
        stop = min(start + at_once, steps)
        columns = reader.build(np.arange(start * batch, stop * batch))
        for step in range(start, stop):
            expected = digest(take(columns, slice((step - start) * batch, (step - start + 1) * batch)))
            if expected != int(account.digests[step]):
                raise InputError(
                    f"Step {step + 1} was trained with the digest {int(account.digests[step]):016x}, but the "
                    f"shards give {expected:016x}: the samples or masks differ from the plan."
                )
    done = f"{steps:,} steps, all with the samples and masks that the shards give"
    return f"{done}; {len(account.attempts)} starts, {account.repeated} steps repeated, {account.skipped} skipped"


def _probes(run: RunData, task: str) -> str:
    if missing := run.unrecorded(task):
        raise InputError(f"No record for step {missing[0]} ({len(missing)} in all): neither a result nor a reason.")
    return f"{len(run.of_task(task))} results, {len(run.missed_of(task))} failed or skipped with a reason"
