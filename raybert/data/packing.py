"""Micro-batches joined and packed: sequences one after the other, in arrays of the same few shapes.

A GPU wants shapes that do not change, and texts have every length. So micro-batches are joined up to the tokens that
one of full windows has, and the rest is filled with dummy sequences that no loss looks at. The last group of a step may
be far from full: it takes the smallest of a few rungs. All of it is made from the lengths that the host knows, so
nothing waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raybert.data.block import Columns
from raybert.data.spec import ORIGINAL, SampleSpec

# Parts of a full micro-batch that a group may be as large as. Each is compiled by itself.
RUNGS = (1, 2, 4)
# Tokens and masked positions come in multiples of this: matrix products on GPUs run best with them.
MULTIPLE = 64
# Sequences are one in so many tokens at most; of shorter ones a group holds more dummy tokens.
SHORTEST = 32
IGNORED = -100  # label of what belongs to no sample


@dataclass(frozen=True, order=True)
class Rung:
    """Room of a packed group."""

    tokens: int  # N
    sequences: int  # S
    masked: int  # M


@dataclass(frozen=True)
class Packing:
    """The rungs of a run, from the smallest up. `longest` is T, which no sequence is longer than."""

    rungs: tuple[Rung, ...]
    longest: int
    spec: SampleSpec

    def smallest(self, tokens: int, sequences: int, masked: int) -> Rung | None:
        """The smallest rung with room for so much; None where there is none."""
        for rung in self.rungs:
            dummies = -(-(rung.tokens - tokens) // self.longest)
            if tokens <= rung.tokens and sequences + dummies <= rung.sequences and masked <= rung.masked:
                return rung
        return None


def packing_for(micro_batch: int, seq_len: int, spec: SampleSpec = ORIGINAL) -> Packing:
    """The packing in which any micro-batch of so many samples of at most `seq_len` tokens fits."""
    sizes = dict.fromkeys(-(-micro_batch // part) for part in RUNGS)
    return Packing(tuple(sorted({_rung(samples, seq_len, spec) for samples in sizes})), seq_len, spec)


def _rung(samples: int, seq_len: int, spec: SampleSpec) -> Rung:
    rows = samples * (2 if spec.halves else 1)
    # Of two halves the second has a [CLS] of its own.
    tokens = _round_up(samples * seq_len + (samples if spec.halves else 0), MULTIPLE)
    sequences = _round_up(max(rows, tokens // SHORTEST) + tokens // seq_len + 1, 8)
    # A sample's number is rounded, and is 1 at least.
    masked = _round_up(int(np.ceil(spec.masked.most * tokens)) + rows, MULTIPLE)
    return Rung(tokens, sequences, masked)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def pack(parts: Sequence[Columns], packing: Packing) -> list[Columns]:
    """Join consecutive micro-batches into groups, as many as fit the largest rung, and pack each one.

    Args:
        parts: micro-batches of R rows as `raybert.data.tensors.rows_of` makes them.

    Returns:
        For each group: input_ids, token_type_ids (N,); starts (S + 1,), where sequence i is the tokens starts[i] to
        starts[i + 1]; masked_positions (M,) among the N, -1 = none, and masked_labels (M,); next_sentence_label (S,);
        with halves document and part (S,), the number of its micro-batch in the group, -1 = none; with a bag
        bag_labels (S, K). What belongs to no sample has the label -100.

    Raises:
        ValueError: a micro-batch has more than the packing was made for.
    """
    groups: list[list[Columns]] = []
    used = np.zeros(3, np.int64)
    for part in parts:
        need = np.array([part["length"].sum(), len(part["length"]), (part["masked_positions"] >= 0).sum()])
        if not groups or packing.smallest(*(used + need).tolist()) is None:
            if packing.smallest(*need.tolist()) is None:
                raise ValueError(
                    f"a micro-batch of {need.tolist()} tokens, rows and masked positions fits no {packing}"
                )
            groups.append([])
            used = np.zeros(3, np.int64)
        groups[-1].append(part)
        used = used + need
    return [_join(group, packing) for group in groups]


def _join(parts: Sequence[Columns], packing: Packing) -> Columns:
    """One group, in the smallest rung that it fits."""
    lengths = np.concatenate([part["length"] for part in parts]).astype(np.int64)
    rows, tokens = len(lengths), int(lengths.sum())
    masked = sum(int((part["masked_positions"] >= 0).sum()) for part in parts)
    rung = packing.smallest(tokens, rows, masked)
    assert rung is not None
    vocabulary = packing.spec.vocabulary
    starts = np.full(rung.sequences + 1, rung.tokens, np.int32)
    starts[0], starts[1 : rows + 1] = 0, np.cumsum(lengths)
    dummies = np.arange(tokens, rung.tokens, packing.longest)  # where each dummy sequence begins
    starts[rows : rows + len(dummies)] = dummies
    made: Columns = {
        "input_ids": np.full(rung.tokens, vocabulary.pad, vocabulary.dtype),
        "token_type_ids": np.zeros(rung.tokens, np.int8),
        "starts": starts,
        "masked_positions": np.full(rung.masked, -1, np.int32),
        "masked_labels": np.full(rung.masked, IGNORED, np.int32),
        "next_sentence_label": _filled(parts, "next_sentence_label", rung.sequences, np.dtype(np.int8)),
    }
    if "bag_labels" in parts[0]:
        made["bag_labels"] = _filled(parts, "bag_labels", rung.sequences, np.dtype(np.int32))
    if packing.spec.halves:
        made["document"] = _filled(parts, "document", rung.sequences, np.dtype(np.int64))
        made["part"] = np.full(rung.sequences, -1, np.int32)
        made["part"][:rows] = np.repeat(np.arange(len(parts)), [len(part["length"]) for part in parts])
    row = place = 0
    for part in parts:
        begins = starts[row : row + len(part["length"])]
        stop = int(starts[row + len(part["length"])]) if row + len(part["length"]) < rows else tokens
        at = np.arange(part["input_ids"].shape[1])
        real = at < part["length"][:, None]  # (R, T)
        made["input_ids"][begins[0] : stop] = part["input_ids"][real]
        made["token_type_ids"][begins[0] : stop] = (at >= part["cut"][:, None])[real]
        wanted = part["masked_positions"] >= 0  # (R, P)
        count = int(wanted.sum())
        made["masked_positions"][place : place + count] = (part["masked_positions"] + begins[:, None])[wanted]
        made["masked_labels"][place : place + count] = part["masked_labels"][wanted]
        row, place = row + len(part["length"]), place + count
    return made


def _filled(parts: Sequence[Columns], name: str, rows: int, kind: np.dtype) -> np.ndarray:
    """A column of all parts, below it -100 up to so many rows."""
    values = np.concatenate([part[name] for part in parts])
    column = np.full((rows, *values.shape[1:]), IGNORED, kind)
    column[: len(values)] = values
    return column
