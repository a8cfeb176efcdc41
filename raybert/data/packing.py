"""A step's rows packed: sequences one after the other, in arrays of the same few shapes.

A GPU wants shapes that do not change, and texts have every length. So the rows of a step fill groups of the tokens that
a micro-batch of full windows has, and what is left of a group is filled with dummy sequences that no loss looks at. The
last group of a step may be far from full: it takes the smallest of a few rungs. All of it is made from the lengths that
the host knows, so nothing waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raybert.data.block import Columns
from raybert.data.spec import ORIGINAL, SampleSpec

# Parts of a full micro-batch that a group may be as large as. Each is compiled by itself.
RUNGS = (1, 2, 4)
# Tokens and masked positions come in multiples of this: matrix products on GPUs run best with them.
MULTIPLE = 64
# Most sequences of a group for each full one that it has room for. Room for more would be computed for nothing, and of
# texts shorter than a quarter of T a group holds more dummy tokens.
ROWS_FOR_ONE = 4
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

    def fits(self, tokens: int, rows: int, masked: int) -> bool:
        """Whether the largest rung has room for so much."""
        return _fits(self.rungs[-1], tokens, rows, masked, self.longest)

    def smallest(self, tokens: int, rows: int, masked: int) -> Rung | None:
        """The smallest rung with room for so much; None where there is none."""
        return next((rung for rung in self.rungs if _fits(rung, tokens, rows, masked, self.longest)), None)


def _fits(rung: Rung, tokens: int, rows: int, masked: int, longest: int) -> bool:
    dummies = -(-(rung.tokens - tokens) // longest)
    return tokens <= rung.tokens and rows + dummies <= rung.sequences and masked <= rung.masked


def packing_for(micro_batch: int, seq_len: int, spec: SampleSpec = ORIGINAL) -> Packing:
    """The packing in which any micro-batch of so many samples of at most `seq_len` tokens fits."""
    sizes = dict.fromkeys(-(-micro_batch // part) for part in RUNGS)
    return Packing(tuple(sorted({_rung(samples, seq_len, spec) for samples in sizes})), seq_len, spec)


def _rung(samples: int, seq_len: int, spec: SampleSpec) -> Rung:
    rows = samples * (2 if spec.halves else 1)
    # Of two halves the second has a [CLS] of its own.
    tokens = _round_up(samples * seq_len + (samples if spec.halves else 0), MULTIPLE)
    sequences = _round_up(ROWS_FOR_ONE * rows + -(-tokens // seq_len) + 1, 8)
    # A sample's number is rounded, and is 1 at least.
    masked = _round_up(int(np.ceil(spec.masked.most * tokens)) + rows, MULTIPLE)
    return Rung(tokens, sequences, masked)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class _Rows:
    """The rows of a step's micro-batches, one after the other and without padding."""

    length: np.ndarray  # (R,) tokens
    masked: np.ndarray  # (R,) of them to predict
    part: np.ndarray  # (R,) the micro-batch that a row is from
    ids: np.ndarray  # (sum of lengths,)
    types: np.ndarray
    positions: np.ndarray  # (sum of masked,) within the row
    labels: np.ndarray
    wide: Columns  # what a row has one of: next_sentence_label, document, bag_labels


def pack(parts: Sequence[Columns], packing: Packing) -> list[Columns]:
    """Spread the rows of micro-batches over groups as full as the largest rung, and pack each group.

    Every row goes into the first group that has room for it. Where samples are halves, the rows of a micro-batch stay
    together, since they are each other's negatives. The groups follow from the samples alone, and there are never more
    of them than micro-batches.

    Args:
        parts: micro-batches of R rows as `raybert.data.tensors.rows_of` makes them.

    Returns:
        For each group: input_ids, token_type_ids (N,); starts (S + 1,), where sequence i is the tokens starts[i] to
        starts[i + 1]; masked_positions (M,) among the N, -1 = none, and masked_labels (M,); next_sentence_label (S,);
        with halves document and part (S,), the number of its micro-batch in the step, -1 = none; with a bag
        bag_labels (S, K). What belongs to no sample has the label -100.

    Raises:
        ValueError: a row, or a micro-batch of halves, has more than the packing was made for.
    """
    rows = _flatten(parts)
    cells = np.arange(len(rows.length)) if not packing.spec.halves else rows.part
    first = np.flatnonzero(np.diff(cells, prepend=-1))  # of each cell of rows that stay together
    needs = [np.add.reduceat(counts, first) for counts in (rows.length, np.ones_like(rows.length), rows.masked)]
    group_of = np.repeat(_first_fit(np.stack(needs, 1).tolist(), packing), needs[1])
    return [_join(rows, np.flatnonzero(group_of == group), packing) for group in range(int(group_of.max()) + 1)]


def empty_groups(packing: Packing) -> list[Columns]:
    """A group without a sample for every rung, from the smallest up."""
    none, spec = np.arange(0), packing.spec
    wide: Columns = {"next_sentence_label": none} | ({"document": none} if spec.halves else {})
    wide |= {"bag_labels": none.reshape(0, spec.bag_tokens)} if spec.bag_tokens else {}
    rows = _Rows(none, none, none, none, none, none, none, wide)
    return [_join(rows, none, replace(packing, rungs=(rung,))) for rung in packing.rungs]


def _first_fit(needs: list[list[int]], packing: Packing) -> list[int]:
    """The group of each cell of so many tokens, rows and masked positions."""
    used: list[tuple[int, int, int]] = []
    chosen, room = [], packing.rungs[-1].tokens
    for tokens, rows, masked in needs:
        for group, own in enumerate([*used, (0, 0, 0)]):
            # Most groups are full of tokens, which is seen without a call.
            if own[0] + tokens <= room and packing.fits(own[0] + tokens, own[1] + rows, own[2] + masked):
                used[group : group + 1] = [(own[0] + tokens, own[1] + rows, own[2] + masked)]
                chosen.append(group)
                break
        else:
            raise ValueError(f"{rows} rows of {tokens} tokens and {masked} masked positions do not fit {packing}")
    return chosen


def _flatten(parts: Sequence[Columns]) -> _Rows:
    ids, types, positions, labels = [], [], [], []
    for part in parts:
        place = np.arange(part["input_ids"].shape[1])
        real = place < part["length"][:, None]  # (R, T)
        wanted = part["masked_positions"] >= 0  # (R, P)
        ids.append(part["input_ids"][real])
        types.append((place >= part["cut"][:, None])[real])
        positions.append(part["masked_positions"][wanted])
        labels.append(part["masked_labels"][wanted])
    names = [name for name in ("next_sentence_label", "document", "bag_labels") if name in parts[0]]
    return _Rows(
        length=np.concatenate([part["length"] for part in parts]).astype(np.int64),
        masked=np.concatenate([(part["masked_positions"] >= 0).sum(1) for part in parts]),
        part=np.repeat(np.arange(len(parts)), [len(part["length"]) for part in parts]),
        ids=np.concatenate(ids),
        types=np.concatenate(types),
        positions=np.concatenate(positions),
        labels=np.concatenate(labels),
        wide={name: np.concatenate([part[name] for part in parts]) for name in names},
    )


def _join(rows: _Rows, chosen: np.ndarray, packing: Packing) -> Columns:
    """One group of the chosen rows, in the smallest rung that they fit."""
    lengths, counts = rows.length[chosen], rows.masked[chosen]
    tokens, count, masked = int(lengths.sum()), len(chosen), int(counts.sum())
    rung = packing.smallest(tokens, count, masked)
    assert rung is not None
    vocabulary = packing.spec.vocabulary
    starts = np.full(rung.sequences + 1, rung.tokens, np.int32)
    starts[0], starts[1 : count + 1] = 0, np.cumsum(lengths)
    dummies = np.arange(tokens, rung.tokens, packing.longest)  # where each dummy sequence begins
    starts[count : count + len(dummies)] = dummies
    made: Columns = {
        "input_ids": np.full(rung.tokens, vocabulary.pad, vocabulary.dtype),
        "token_type_ids": np.zeros(rung.tokens, np.int8),
        "starts": starts,
        "masked_positions": np.full(rung.masked, -1, np.int32),
        "masked_labels": np.full(rung.masked, IGNORED, np.int32),
        "next_sentence_label": _filled(rows, "next_sentence_label", chosen, rung.sequences, np.dtype(np.int8)),
    }
    if "bag_labels" in rows.wide:
        made["bag_labels"] = _filled(rows, "bag_labels", chosen, rung.sequences, np.dtype(np.int32))
    if packing.spec.halves:
        made["document"] = _filled(rows, "document", chosen, rung.sequences, np.dtype(np.int64))
        made["part"] = np.full(rung.sequences, -1, np.int32)
        made["part"][:count] = rows.part[chosen]
    own = _ranges(rows.length, chosen)
    made["input_ids"][:tokens], made["token_type_ids"][:tokens] = rows.ids[own], rows.types[own]
    own = _ranges(rows.masked, chosen)
    made["masked_positions"][:masked] = rows.positions[own] + np.repeat(starts[:count], counts)
    made["masked_labels"][:masked] = rows.labels[own]
    return made


def _ranges(lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Where the chosen ones of consecutive ranges of such lengths lie."""
    own = lengths[chosen]
    begins = (np.cumsum(lengths) - lengths)[chosen]
    return np.arange(own.sum()) + np.repeat(begins - (np.cumsum(own) - own), own)


def _filled(rows: _Rows, name: str, chosen: np.ndarray, room: int, kind: np.dtype) -> np.ndarray:
    """A column of the chosen rows, below it -100 up to the rung's room."""
    values = rows.wide[name][chosen]
    column = np.full((room, *values.shape[1:]), IGNORED, kind)
    column[: len(values)] = values
    return column
