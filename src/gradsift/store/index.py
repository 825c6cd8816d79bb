"""Which shard a row is in: eight bytes of memory per row, and never believed before the row table confirms it (ours).

A million row ids with their content hashes take 250 MB as a dictionary, and a pool may have a hundred million rows. Kept
here is one number per row: 40 bits of a hash of its id, then 24 bits that number its shard. A lookup that hits reads the
row table of that shard from the disk, checked as always, so a hit by chance costs time and never an answer.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import UInt64

MAX_SHARDS = 1 << 24
_SHARD = np.uint64(MAX_SHARDS - 1)
_HASH = ~_SHARD
_KEPT = 4  # row tables kept decoded: plans walk the pool shard by shard

Table = Mapping[str, str]


class RowIndex(Mapping[str, str]):
    """Committed row id -> content hash, read from the row tables on demand.

    Args:
        load: number of a shard -> its rows' content hashes by id, in the shard's order; numbers count from 0 as added.
    """

    def __init__(self, load: Callable[[int], Table]) -> None:
        self._load = load
        self._runs: list[UInt64[np.ndarray, " n"]] = []
        self._kept: OrderedDict[int, Table] = OrderedDict()
        self.num_shards = 0

    def fill(self, shards: Iterable[Sequence[str]]) -> tuple[str, int, int] | None:
        """Add all shards of a store at once; for an empty index.

        Args:
            shards: row ids of each.

        Returns:
            A row that two shards hold, and their numbers; None where there is none, as there should be.
        """
        parts = []
        for ids in shards:
            parts.append(_keys(ids) | np.uint64(self.num_shards))
            self.num_shards += 1
        if not parts:
            return None
        run = np.sort(np.concatenate(parts))
        self._runs = [run]
        for at in np.flatnonzero(run[1:] & _HASH == run[:-1] & _HASH) + 1:
            same = run[np.searchsorted(run, run[at] & _HASH) : at]  # mostly one key: the row's own hash, or chance
            for first in {int(key & _SHARD) for key in same}:
                second = int(run[at] & _SHARD)
                both = self._table(first).keys() & self._table(second).keys() if first != second else ()
                for row in both:
                    return row, first, second
        return None

    def add(self, ids: Sequence[str]) -> None:
        """Add the next shard.

        Args:
            ids: its row ids; none of them is in the index.
        """
        self._runs.append(np.sort(_keys(ids) | np.uint64(self.num_shards)))
        self.num_shards += 1
        # Runs at least halve in length from one to the next, so there are few and each row is merged few times.
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")

    def find(self, ids: Sequence[str]) -> list[str | None]:
        """Look rows up; each shard that may hold some of them is read once.

        Args:
            ids: n row ids.

        Returns:
            Per row its content hash, or None where it is not committed.

        Raises:
            StoreError: a row table is damaged.
        """
        found: list[str | None] = [None] * len(ids)
        keys, wanted = _keys(ids), defaultdict[int, list[int]](list)
        for run in self._runs:
            low, high = np.searchsorted(run, keys), np.searchsorted(run, keys | _SHARD, side="right")
            for row in np.flatnonzero(high > low):
                for key in run[low[row] : high[row]]:
                    wanted[int(key & _SHARD)].append(int(row))
        for shard, rows in wanted.items():
            table = self._table(shard)
            for row in rows:
                found[row] = table.get(ids[row], found[row])
        return found

    def _table(self, shard: int) -> Table:
        table = self._kept.get(shard)
        if table is None:
            table = self._kept[shard] = self._load(shard)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return table

    def __getitem__(self, row: str) -> str:
        content = self.find([row])[0]
        if content is None:
            raise KeyError(row)
        return content

    def __iter__(self) -> Iterator[str]:
        for shard in range(self.num_shards):
            yield from self._load(shard)

    def __len__(self) -> int:
        return sum(map(len, self._runs))


def _keys(ids: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """Hash ids; Python's own hash of a text is fast, and nothing of it is written down."""
    return np.fromiter(map(hash, ids), np.int64, len(ids)).view(np.uint64) & _HASH
