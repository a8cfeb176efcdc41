"""The ledger: which samples, with which masks, each step was trained on, so that anyone can check it afterwards.

The *digest* of a step is the sum modulo 2**64 of one 64-bit hash a sample, so it depends neither on the order of the
samples nor on how they were spread over workers. The hash of a sample is BLAKE2b with 8 bytes of digest, read as a
little-endian number, over these bytes, all little endian:

    index int64 | next_sentence_label int8 | cut int32 | length int32 | input_ids uint16[T]
    | masked_positions int32[P] | masked_labels uint16[P]      (uint32 both, of a vocabulary of more than 65,535 tokens)

``cut`` is the number of tokens before segment B and ``length`` that of all tokens without padding; in unused places a
position is -1 and a label [PAD] (50260 in raybert's own vocabulary). These are the columns that the training step turns
into tensors.

Files: ``RUN/ledger/AAAAA-SSSSSSSSSS.jsonl``, A the number of the start of the worker group, S the file's first step.
The first line tells of the start, ``{"attempt", "restored", "workers"}``, `restored` being the step of the checkpoint
it went on from; every further line is ``{"step", "digest"}``, the digest as 16 hexadecimal digits. Step s holds the
samples [(s - 1) G, s G). A step whose update was left out because its gradient was not finite has ``"skipped": true``.
A checkpoint is committed only when the lines of its steps lie in storage.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raybert import storage
from raybert.data.block import Columns
from raybert.errors import InputError
from raybert.storage.growing import GrowingFile

LEDGER = "ledger"
FILE_STEPS = 10_000  # of one file; where nothing can be appended to, a file is written again while it grows
_HASHED = ("index", "next_sentence_label", "cut", "length", "input_ids", "masked_positions", "masked_labels")
_DIGEST = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"(\d{5})-(\d{10})\.jsonl")


def digest(columns: Columns) -> int:
    """The sum modulo 2**64 of the hashes of some samples in compact columns (see `raybert.data.block`)."""
    parts = [np.ascontiguousarray(columns[name]) for name in _HASHED]
    rows = np.concatenate([part.view(np.uint8).reshape(len(part), -1) for part in parts], axis=1)
    hashes = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return int(np.frombuffer(hashes, "<u8").sum(dtype=np.uint64))


def sum_over_ranks(digests: Sequence[int], device: torch.device, world_size: int) -> list[int]:
    """The digests of whole steps from those of each rank's samples: one small exchange for many steps."""
    if world_size == 1:
        return list(digests)
    # In halves, whose sums cannot overflow.
    halves = torch.tensor([[d >> 32 for d in digests], [d & 0xFFFFFFFF for d in digests]], device=device)
    dist.all_reduce(halves)
    return [((high << 32) + low) % 2**64 for high, low in zip(*halves.tolist(), strict=True)]


class Ledger:
    """Writes the lines of one start of the worker group; rank 0 has one."""

    def __init__(self, run_uri: str, *, restored: int, workers: int) -> None:
        self._directory = storage.join(run_uri, LEDGER)
        before = [int(match[1]) for match in map(_NAME.fullmatch, _names(run_uri)) if match]
        self._header = {"attempt": max(before, default=0) + 1, "restored": restored, "workers": workers}
        self._begin(restored + 1)

    @property
    def attempt(self) -> int:
        """The number of this start, from 1."""
        return int(self._header["attempt"])

    def _begin(self, first: int) -> None:
        file = GrowingFile(storage.join(self._directory, f"{self.attempt:05d}-{first:010d}.jsonl"))
        file.append([json.dumps(self._header)])
        self._file, self._steps = file, 0

    def add(self, first: int, digests: Sequence[int], skipped: Sequence[bool]) -> None:
        """Note consecutive steps from `first` on. After an exception nothing was noted, and it may be done again."""
        lines = []
        for step, (value, left_out) in enumerate(zip(digests, skipped, strict=True), first):
            line = {"step": step, "digest": f"{value:016x}"}
            lines.append(json.dumps(line | {"skipped": True} if left_out else line))
        if self._steps >= FILE_STEPS:
            self._file.close()
            self._begin(first)
        self._file.append(lines)
        self._steps += len(lines)

    def flush(self) -> None:
        """Return when all that was added before lies in storage."""
        self._file.flush()

    def close(self) -> None:
        """Flush; nothing is added any more."""
        self._file.close()


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group, as the ledger has it. Steps `restored` + 1 to `last` have a line."""

    number: int
    restored: int
    workers: int
    last: int


@dataclass(frozen=True)
class Account:
    """What a ledger holds: 8 bytes a step, whatever the number of restarts."""

    digests: np.ndarray  # uint64 (steps,), of step 1 and on
    attempts: Sequence[Attempt]
    repeated: int  # lines of steps that an earlier start had trained on before it was cut off
    skipped: int  # steps whose update was left out, in the course that counts


def read_account(run_uri: str) -> Account:
    """Read the ledger of a run and check that it is one sequence without gaps.

    Every start must go on right behind the checkpoint that it restored, that checkpoint must lie within what was
    trained on before, and a step that was trained on again must have the same digest.

    Raises:
        InputError: there is no ledger, a line is damaged, a step is missing or out of order, or two lines of one step
            differ.
    """
    course = _Course()
    for name in (name for name in _names(run_uri) if _NAME.fullmatch(name)):
        uri = storage.join(run_uri, LEDGER, name)
        lines = _read_lines(uri)
        header = next(lines, None)
        if header is None:
            continue  # cut off before its first line was whole
        course.go_on(header)
        for line in lines:
            course.add(line, uri)
    if not course.attempts:
        raise InputError(f"The run {run_uri} has no ledger.")
    return course.account()


class _Course:
    """The steps of a ledger, file after file: the next one is of the same start or of a later one."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self._digests, self._size = np.zeros(1024, np.uint64), 0  # of step 1 and on; how many of them are known
        self._skipped: set[int] = set()
        self._repeated = 0

    def go_on(self, header: dict[str, Any]) -> None:
        """A file begins: of the start that is under way, or of another one, behind the checkpoint that it restored."""
        number, restored = header["attempt"], header["restored"]
        if self.attempts and self.attempts[-1].number == number:
            return
        if restored > self._size:
            raise InputError(
                f"The ledger lacks the steps {self._size + 1} to {restored}, but start {number} resumed after them."
            )
        self.attempts.append(Attempt(number, restored, header["workers"], restored))
        self._skipped = {step for step in self._skipped if step <= restored}

    def add(self, line: dict[str, Any], uri: str) -> None:
        """The next step of the start that is under way."""
        step, value, attempt = line["step"], np.uint64(int(line["digest"], 16)), self.attempts[-1]
        if step != attempt.last + 1:
            raise InputError(f"{uri} has step {step} where step {attempt.last + 1} should be.")
        self.attempts[-1] = replace(attempt, last=step)
        if step <= self._size:
            self._compare(step, value, uri)
        else:
            self._append(value)
        if line.get("skipped"):
            self._skipped.add(step)

    def _compare(self, step: int, value: np.uint64, uri: str) -> None:
        self._repeated += 1
        before = self._digests[step - 1]
        if before != value:
            raise InputError(
                f"Step {step} was trained with the digest {int(before):016x}, and after a restart with "
                f"{int(value):016x} ({uri}): the samples differ."
            )

    def _append(self, value: np.uint64) -> None:
        if self._size == len(self._digests):
            self._digests = np.concatenate([self._digests, np.zeros_like(self._digests)])
        self._digests[self._size] = value
        self._size += 1

    def account(self) -> Account:
        return Account(self._digests[: self._size], self.attempts, self._repeated, len(self._skipped))


def _names(run_uri: str) -> list[str]:
    return [posixpath.basename(uri) for uri in storage.list_dir(storage.join(run_uri, LEDGER))]


def _read_lines(uri: str) -> Iterator[dict[str, Any]]:
    """The objects of a file's lines; the last one may be half written, if its writer was killed."""
    content = storage.read_bytes(uri)
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines()):
        try:
            found = json.loads(line)
            numbers = [found[key] for key in (("attempt", "restored", "workers") if number == 0 else ("step",))]
            good = all(type(value) is int and value >= 0 for value in numbers)
            if not good or (number > 0 and not _DIGEST.fullmatch(found["digest"])):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{uri} has a damaged line: {line[:80]!r}.") from error
        yield found
