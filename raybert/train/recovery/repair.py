"""Which checkpoint a run goes on from, and what becomes of one that is damaged.

Ray Train's own record, ``checkpoint_manager_snapshot.json``, says which checkpoints were committed, and its newest is
what the workers restore. Before a run goes on, the newest one is read and compared with its checksums. One that is
damaged is taken off the record and moved aside, so that the one before it is the newest.
"""

import json
import re
from typing import Any

import ray

from raybert import storage
from raybert.errors import DamagedCheckpoint, InputError, RunFailed
from raybert.model.directory import BEFORE, REQUIRED, SUMS, verify_files
from raybert.train.recovery import faults
from raybert.train.recovery.committed import CHECKPOINTS, SNAPSHOT

_STEP = re.compile(r"step-\d{8}")
DAMAGED = "damaged-"


def repair(run_uri: str) -> list[str]:
    """Make sure that the record can be read and that its newest checkpoint is whole.

    Returns:
        A sentence for each checkpoint that was passed over; they are noted in the run's faults too.

    Raises:
        RunFailed: there are checkpoints on the record, and none of them is there.
        InputError: the storage does not let us in.
    """
    _sweep_up(run_uri)
    uri = storage.join(run_uri, SNAPSHOT)
    told: list[tuple[str, str]] = []  # kind of fault, sentence
    damaged: list[str] = []
    try:
        record = json.loads(storage.read_bytes(uri))
        results, indices = record["checkpoint_results"], record["checkpoint_report_indices"]
        entries = list(zip([result["checkpoint_dir_name"] for result in results], results, indices, strict=True))
    except InputError:
        raise  # we are not let in, which says nothing of the record
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        record, entries, damaged = _new_record(run_uri)
        missing = isinstance(error, FileNotFoundError)
        if entries or not missing:  # a run that has not come to its first checkpoint has no list
            how = "missing" if missing else "damaged"
            text = f"The list of checkpoints was {how}; it was made again from the checkpoints themselves."
            told.append(("checkpoint_list", text))
    told += [("damaged_checkpoint", f"The checkpoint {name} is damaged, and passed over.") for name in damaged]
    kept = [entry for entry in entries if storage.list_dir(storage.join(run_uri, entry[0]))]
    if entries and not kept:  # a disk that is not mounted looks like this, and the run would lose all that it did
        raise RunFailed(
            f"{uri} lists {len(entries)} checkpoints, and none of them is there. Bring {CHECKPOINTS}/ back, or remove "
            "that list as well to begin the run anew."
        )
    gone = [name for name, *_ in entries if name not in {k[0] for k in kept}]
    told += [("damaged_checkpoint", f"The checkpoint {name} is listed and gone.") for name in gone]
    while kept:
        name = kept[-1][0]
        try:
            verify_files(storage.join(run_uri, name))
        except DamagedCheckpoint as error:
            before = kept[-2][0] if len(kept) > 1 else "the beginning"
            text = f"The newest checkpoint is damaged: {error} It is passed over, and the run goes on from {before}."
            told.append(("damaged_checkpoint", text))
            damaged.append(kept.pop()[0])
        else:
            break
    if told:
        _write(uri, record, kept)
        for name in damaged:
            _set_aside(run_uri, name)
        for kind, text in told:
            faults.note(run_uri, kind, text)
    return [text for _, text in told]


def halves(run_uri: str) -> list[str]:
    """URIs of checkpoints that are neither on Ray Train's record nor whole: what an upload, or the deletion of an old
    one, has left that was cut short. Nothing goes on from them. While a run goes on, one may be under way.
    """
    try:
        record = json.loads(storage.read_bytes(storage.join(run_uri, SNAPSHOT)))
        listed = {result["checkpoint_dir_name"].rpartition("/")[2] for result in record["checkpoint_results"]}
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


def remove_halves(run_uri: str) -> None:
    """Only while nobody writes checkpoints of the run."""
    for uri in halves(run_uri):
        storage.remove(uri)


def _sweep_up(run_uri: str) -> None:
    """Remove what a process that was killed while it wrote a checkpoint has left: nobody writes one now.

    What it was about to replace, and has not, gets its name back.
    """
    remove_halves(run_uri)
    for uri in storage.list_dir(storage.join(run_uri, CHECKPOINTS)):
        directory, _, name = uri.rpartition("/")
        place = storage.join(directory, name.removeprefix(BEFORE))
        if name.startswith(BEFORE) and not storage.exists(place):
            storage.move(uri, place)
        elif name.startswith("."):
            storage.remove(uri)


def _new_record(run_uri: str) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any], int]], list[str]]:
    """A record of the checkpoints that lie there whole, in the order of their steps; and those that do not."""
    names = [uri.rpartition("/")[2] for uri in storage.list_dir(storage.join(run_uri, CHECKPOINTS))]
    whole: list[tuple[str, dict[str, Any], int]] = []
    damaged = []
    for name in sorted(name for name in names if _STEP.fullmatch(name)):
        try:
            verify_files(storage.join(run_uri, CHECKPOINTS, name))
        except DamagedCheckpoint:
            damaged.append(f"{CHECKPOINTS}/{name}")
            continue
        result = {"version": 0, "checkpoint_dir_name": f"{CHECKPOINTS}/{name}", "metrics": {"step": int(name[5:])}}
        whole.append((f"{CHECKPOINTS}/{name}", result, len(whole)))
    return {"ray_version": ray.__version__, "current_report_index": len(whole)}, whole, damaged


def _write(uri: str, record: dict[str, Any], entries: list[tuple[str, dict[str, Any], int]]) -> None:
    names = {name for name, *_ in entries}
    results = [result for _, result, _ in entries]
    record |= {
        "checkpoint_results": results,
        "checkpoint_report_indices": [index for *_, index in entries],
        "latest_checkpoint_result": results[-1] if results else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
    }
    for key in ("validated", "timed_out_validation", "failed_validation"):
        key += "_checkpoint_dir_names"
        record[key] = [name for name in record.get(key, []) if name in names]
    storage.write_json(uri, record)


def _set_aside(run_uri: str, name: str) -> None:
    """Keep the damaged files for whoever wants to look, under a name that nothing reads."""
    directory, _, last = name.rpartition("/")
    aside = storage.join(run_uri, directory, DAMAGED + last)
    storage.remove(aside)
    storage.move(storage.join(run_uri, name), aside)
