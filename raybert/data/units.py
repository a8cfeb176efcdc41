"""Units of a shard set in memory: windows as flat arrays. Apart from raybert.data.shards, which needs Arrow."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Unit:
    """A row group of a shard: what is read at once."""

    shard: str
    row_group: int
    rows: int


@dataclass(frozen=True)
class UnitRows:
    """Windows as flat arrays: window i has ``tokens[token_offsets[i]:token_offsets[i + 1]]``, and so for its ends."""

    tokens: np.ndarray  # uint16 or uint32
    token_offsets: np.ndarray  # int64 (n + 1,)
    ends: np.ndarray  # uint16
    end_offsets: np.ndarray  # int64 (n + 1,)
    doc: np.ndarray  # int64 (n,)

    def __len__(self) -> int:
        return len(self.doc)
