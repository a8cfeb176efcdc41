"""Which sample of the run is which window: a pure function of the units' sizes and the seed.

Sample i belongs to epoch i // rows. In an epoch the units come in a seeded order, and the rows of a unit in a seeded
order too: every row once an epoch, and consecutive samples read the same unit. Step k of a run with global batch G is
the samples [k G, (k + 1) G), so going on at step k costs the same whatever k is.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from raybert.data.rng import bits, fold

_UNIT_ORDER, _ROW_ORDER = 1, 2


class Plan:
    """The order of samples.

    Args:
        rows_per_unit: rows of each unit, in the order of the manifest.
        seed: the data seed.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(self, rows_per_unit: Sequence[int], seed: int) -> None:
        self.rows_per_unit = np.asarray(rows_per_unit, np.int64)
        self.seed = seed
        self.rows = int(self.rows_per_unit.sum())
        if self.rows == 0:
            raise ValueError("a plan needs at least one row")
        # The order of an epoch takes 16 bytes a unit: about 600 KB for 10 B tokens in units of 512 x 512.
        self._epoch = lru_cache(maxsize=2)(self._order_units)
        self._unit = lru_cache(maxsize=64)(self._order_rows)

    def _order_units(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        keys = fold(self.seed, epoch, np.arange(len(self.rows_per_unit)))
        order = np.argsort(bits(keys, _UNIT_ORDER, 1)[:, 0], kind="stable")
        return order, np.cumsum(self.rows_per_unit[order])

    def _order_rows(self, epoch: int, unit: int) -> np.ndarray:
        drawn = bits(fold(self.seed, epoch, unit), _ROW_ORDER, int(self.rows_per_unit[unit]))[0]
        return np.argsort(drawn, kind="stable")

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N,) sample indices -> their (N,) epochs, units and rows within the unit."""
        samples = np.asarray(samples, np.int64)
        epochs, places = np.divmod(samples, self.rows)
        units, rows = np.empty_like(samples), np.empty_like(samples)
        for epoch in np.unique(epochs):
            order, ends = self._epoch(int(epoch))
            here = epochs == epoch
            slots = np.searchsorted(ends, places[here], side="right")
            units[here] = order[slots]
            rows[here] = places[here] - (ends[slots] - self.rows_per_unit[order[slots]])
        for epoch, unit in sorted(set(zip(epochs.tolist(), units.tolist(), strict=True))):
            here = (epochs == epoch) & (units == unit)
            rows[here] = self._unit(epoch, unit)[rows[here]]
        return epochs, units, rows
