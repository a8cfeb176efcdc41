"""Which checkpoint a run goes on from, and what becomes of one that is damaged.

Ray Train's own record (`SNAPSHOT`) says which checkpoints were committed, and its newest is
what the workers restore. Before a run goes on, the newest one is read and compared with its checksums. One that is
damaged is taken off the record and moved aside, so that the one before it is the newest.
"""

import errno
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from raybert import storage
from raybert.errors import DamagedCheckpoint, InputError, RunFailed
from raybert.model.directory import BEFORE, REQUIRED, SUMS, verify_files
from raybert.ray_internals.names import SNAPSHOT
from raybert.records import read_object
from raybert.train.recovery import faults
from raybert.train.recovery.committed import CHECKPOINTS

_STEP = re.compile(r"step-\d{8}")
DAMAGED = "damaged-"


@dataclass(frozen=True)
class _Committed:
    """A checkpoint on the record: its directory in the run's, its result, and the index of its report."""

    name: str
    result: dict[str, Any]
    index: int


@dataclass
class _Findings:
    """What is wrong with the record or its checkpoints: (kind of fault, sentence), and the damaged directories."""

    notes: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def checkpoint(self, sentence: str) -> None:
        self.notes.append(("damaged_checkpoint", sentence))


def repair(run_uri: str) -> list[str]:
    """Make sure that the record can be read and that its newest checkpoint is complete.

    Returns:
        A sentence for each checkpoint that was skipped; they are noted in the run's faults too.

    Raises:
        RunFailed: there are checkpoints on the record, but none of them exists.
        InputError: the storage does not let us in.
    """
    _remove_leftovers(run_uri)
    found = _Findings()
    record, listed = _read_record(run_uri, found)
    kept = _drop_missing(run_uri, listed, found)
    _drop_damaged(run_uri, kept, found)
    if found.notes:
        _write_record(run_uri, record, kept)
        for name in found.damaged:
            _set_aside(run_uri, name)
        for kind, text in found.notes:
            faults.note(run_uri, kind, text)
    return [text for _, text in found.notes]


def _read_record(run_uri: str, found: _Findings) -> tuple[dict[str, Any], list[_Committed]]:
    """Ray Train's record and the checkpoints on it; made again from the checkpoints where it cannot be read."""
    try:
        record = read_object(storage.join(run_uri, SNAPSHOT))
        results, indices = record["checkpoint_results"], record["checkpoint_report_indices"]
        return record, [
            _Committed(name, result, index)
            for name, result, index in zip(_listed(record), results, indices, strict=True)
        ]
    except InputError:
        raise  # we are not let in, which says nothing of the record
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        how = "missing" if isinstance(error, FileNotFoundError) else "damaged"
    record, listed = _new_record(run_uri, found)
    if listed or how == "damaged":  # a run that has not come to its first checkpoint has no list
        text = f"The list of checkpoints was {how}; it was rebuilt from the checkpoints."
        found.notes.insert(0, ("checkpoint_list", text))
    return record, listed


def _drop_missing(run_uri: str, listed: list[_Committed], found: _Findings) -> list[_Committed]:
    """The checkpoints whose directories are there."""
    kept = [one for one in listed if storage.list_dir(storage.join(run_uri, one.name))]
    if listed and not kept:  # a disk that is not mounted looks like this, and the run would lose all that it did
        raise RunFailed(
            f"{storage.join(run_uri, SNAPSHOT)} lists {len(listed)} checkpoints, but none of them exists. Restore "
            f"{CHECKPOINTS}/, or delete the list to start the run from scratch."
        )
    there = {one.name for one in kept}
    for one in listed:
        if one.name not in there:
            found.checkpoint(f"The checkpoint {one.name} is listed but missing.")
    return kept


def _drop_damaged(run_uri: str, kept: list[_Committed], found: _Findings) -> None:
    """Take the newest ones off the list, in place, until the last one is as it was written."""
    while kept:
        try:
            verify_files(storage.join(run_uri, kept[-1].name))
            return
        except DamagedCheckpoint as error:
            found.damaged.append(kept.pop().name)
            before = kept[-1].name if kept else "the start"
            found.checkpoint(
                f"The newest checkpoint is damaged: {error} It is skipped, and the run resumes from {before}."
            )


def _listed(record: dict[str, Any]) -> list[str]:
    """The names of the checkpoints on Ray Train's record.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    names = [result["checkpoint_dir_name"] for result in record["checkpoint_results"]]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("the name of a checkpoint is not text")
    return names


def incomplete_checkpoints(run_uri: str) -> list[str]:
    """URIs of checkpoints that are neither on Ray Train's record nor whole: what an upload, or the deletion of an old
    one, has left that was cut short. Nothing goes on from them. While a run goes on, one may be under way.
    """
    try:
        record = read_object(storage.join(run_uri, SNAPSHOT))
        listed = {name.rpartition("/")[2] for name in _listed(record)}
    except InputError:
        raise
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []  # what is whole is not known before the record is made again
    found = []
    for uri in storage.list_dir(storage.join(run_uri, CHECKPOINTS)):
        name = uri.rpartition("/")[2]
        if _STEP.fullmatch(name) and name not in listed:
            files = {file.rpartition("/")[2] for file in storage.list_dir(uri)}
            if not files >= {*REQUIRED, SUMS}:
                found.append(uri)
    return found


def remove_incomplete_checkpoints(run_uri: str) -> None:
    """Call it only while no process writes checkpoints of the run."""
    for uri in incomplete_checkpoints(run_uri):
        storage.remove(uri)


def _remove_leftovers(run_uri: str) -> None:
    """Remove what a process that was killed while it wrote a checkpoint has left: nobody writes one now.

    What it was about to replace, and has not, gets its name back. The probe service may be at the best weights even
    now; it writes them elsewhere (`raybert.probe.service.best`) and only gives them their name here.
    """
    remove_incomplete_checkpoints(run_uri)
    for uri in storage.list_dir(storage.join(run_uri, CHECKPOINTS)):
        directory, _, name = uri.rpartition("/")
        place = storage.join(directory, name.removeprefix(BEFORE))
        if name.startswith(BEFORE) and not storage.exists(place):
            try:
                Path(uri).rename(place)  # in no bucket there are such names
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):  # others have the name by now
                    raise
        elif name.startswith("."):
            storage.remove(uri)


def _new_record(run_uri: str, found: _Findings) -> tuple[dict[str, Any], list[_Committed]]:
    """A record of the checkpoints that lie there whole, in the order of their steps."""
    names = [uri.rpartition("/")[2] for uri in storage.list_dir(storage.join(run_uri, CHECKPOINTS))]
    whole: list[_Committed] = []
    for last in sorted(name for name in names if _STEP.fullmatch(name)):
        name = f"{CHECKPOINTS}/{last}"
        try:
            verify_files(storage.join(run_uri, name))
        except DamagedCheckpoint:
            found.damaged.append(name)
            found.checkpoint(f"The checkpoint {name} is damaged and is skipped.")
        else:
            result = {"version": 0, "checkpoint_dir_name": name, "metrics": {"step": int(last[5:])}}
            whole.append(_Committed(name, result, len(whole)))
    return {"ray_version": ray.__version__, "current_report_index": len(whole)}, whole


def _write_record(run_uri: str, record: dict[str, Any], kept: list[_Committed]) -> None:
    names = {one.name for one in kept}
    record |= {
        "checkpoint_results": [one.result for one in kept],
        "checkpoint_report_indices": [one.index for one in kept],
        "latest_checkpoint_result": kept[-1].result if kept else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
    }
    for key in ("validated", "timed_out_validation", "failed_validation"):
        key += "_checkpoint_dir_names"
        record[key] = [name for name in record.get(key, []) if name in names]
    storage.write_json(storage.join(run_uri, SNAPSHOT), record)


def _set_aside(run_uri: str, name: str) -> None:
    """Keep the damaged files for whoever wants to look, under a name that nothing reads."""
    directory, _, last = name.rpartition("/")
    aside = storage.join(run_uri, directory, DAMAGED + last)
    storage.remove(aside)
    storage.move(storage.join(run_uri, name), aside)
