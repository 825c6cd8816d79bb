"""Sketches that stay on the disk: an array-like whose rows are read when they are asked for, checked before use (ours).

A million sketches of 4,093 float16 numbers are 8 GB, and 16 GB in float32. Whoever needs all of them walks
:meth:`StoredSketches.blocks`, which follows the shards; whoever needs some indexes. Bytes are read, never mapped, so that
resident memory is what was asked for.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int

from gradsift.errors import StoreError
from gradsift.manifest import read_error
from gradsift.store.ledger import SHARDS, Record, damage
from gradsift.store.reading import read_checked
from gradsift.store.shards import sketch_file
from gradsift.store.signals import SignalStore

BLOCK_ROWS = 4096
WHOLE_SHARE = 4  # a shard of which more than one row in so many is wanted is read whole


@dataclass(frozen=True, eq=False)
class StoredSketches:
    """Sketches of N rows at full length, as :meth:`SignalStore.gather` gives them. Made by :func:`stored_sketches`.

    Args:
        store: where they lie.
        at: int64 [N] each row's position in the store; rows may share one.
    """

    store: SignalStore
    at: Int[np.ndarray, " N"]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        assert self.store.spec.projection is not None
        return (len(self.at), self.store.spec.projection.dim)

    @property
    def dtype(self) -> np.dtype:
        """float32, whatever the disk holds."""
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, rows: slice | Int[np.ndarray, " k"] | Bool[np.ndarray, " N"]) -> Float32[np.ndarray, "k D"]:
        """Read some rows: a slice, positions or a mask."""
        if not isinstance(rows, slice | np.ndarray):
            raise TypeError(f"stored sketches are read by a slice or an array of rows, not by {type(rows).__name__}")
        at = self.at[rows]
        out = np.empty((len(at), self.shape[1]), dtype=np.float32)
        shard = self.store.shard[at]
        order = np.argsort(shard, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1) if len(order) else ():
            self._fill(out, here, at[here])
        return out

    def part(self, rows: Int[np.ndarray, " k"]) -> StoredSketches:
        """Look at some rows, reading none.

        Args:
            rows: int64 [k] positions.

        Returns:
            Their sketches, in that order.
        """
        return dataclasses.replace(self, at=self.at[rows])

    def blocks(self, num_rows: int = BLOCK_ROWS) -> Iterator[tuple[Int[np.ndarray, " b"], Float32[np.ndarray, "b D"]]]:
        """Walk all rows in the order of the disk, each file read once.

        Args:
            num_rows: rows of a block, about.

        Yields:
            int64 [b] positions and float32 [b, D] their sketches; a buffer that the next block overwrites.
        """
        order = self._disk_order
        buffer = np.empty((min(num_rows, len(order)), self.shape[1]), dtype=np.float32)
        for start in range(0, len(order), num_rows):
            rows = order[start : start + num_rows]
            shard = self.store.shard[self.at[rows]]
            for here in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(shard)) + 1):
                self._fill(buffer, here, self.at[rows[here]])
            yield rows, buffer[: len(rows)]

    @cached_property
    def _disk_order(self) -> Int[np.ndarray, " N"]:
        return np.lexsort((self.store.row[self.at], self.store.shard[self.at]))

    def _fill(self, out: Float32[np.ndarray, "k D"], here: Int[np.ndarray, " b"], at: Int[np.ndarray, " b"]) -> None:
        """Put rows of one shard at their places."""
        record = self.store.records[self.store.shard[at[0]]]
        unit = read_rows(self.store, record, self.store.row[at], self.shape[1])
        # float64 in between, as gather multiplies
        out[here] = unit.astype(np.float32) * self.store.grad_norm[at, None]


def read_rows(store: SignalStore, record: Record, rows: Int[np.ndarray, " b"], dim: int) -> Float16[np.ndarray, "b D"]:
    """Read unit sketches of one shard; its file is checked against the commit record the first time.

    Args:
        store: an open store.
        record: the shard.
        rows: int64 [b] rows of the shard.
        dim: D.

    Returns:
        float16 [b, D], in the order asked.

    Raises:
        StoreError: the file is damaged or cannot be read.
    """
    name, width = sketch_file(record.unit), 2 * dim
    mark = record.files.get(name)
    head = -1 if mark is None else mark.bytes - record.num_rows * width
    if mark is None or head < 0:
        raise damage(store.folder, record, name, str(mark), f"{record.num_rows} sketches of {dim} numbers")
    if name not in store._checked:
        data = read_checked(store.folder, record, name)
        _check_header(store, record, name, data[:head], dim)
        store._checked.add(name)
        return np.frombuffer(data, dtype="<f2", offset=head).reshape(record.num_rows, dim)[rows]
    path = store.folder / SHARDS / name
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if WHOLE_SHARE * len(rows) > record.num_rows:
                data = os.pread(handle, record.num_rows * width, head)
                whole = np.frombuffer(data, dtype="<f2").reshape(record.num_rows, dim)
                return whole[rows]
            parts = [os.pread(handle, width, head + int(row) * width) for row in rows]
            return np.frombuffer(b"".join(parts), dtype="<f2").reshape(len(rows), dim)
        finally:
            os.close(handle)
    except OSError as error:
        raise read_error(error, path) from error
    except ValueError:
        raise damage(store.folder, record, name, "fewer bytes than before", f"{mark.bytes} bytes") from None


def _check_header(store: SignalStore, record: Record, name: str, head: bytes, dim: int) -> None:
    import io

    try:
        file = io.BytesIO(head)
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        good = version == (1, 0) and not fortran and dtype == np.float16 and file.tell() == len(head)
    except ValueError:
        shape, good = None, False
    if not good or shape != (record.num_rows, dim):
        raise damage(store.folder, record, name, f"shape {shape}", f"float16 {(record.num_rows, dim)}")


def stored_sketches(store: SignalStore, at: Int[np.ndarray, " N"]) -> StoredSketches:
    """Look at rows' sketches without reading them.

    Args:
        store: an open store.
        at: int64 [N] positions in it; all usable.

    Returns:
        The sketches.

    Raises:
        StoreError: no sketches were measured, or a row is not usable.
    """
    if store.spec.projection is None:
        raise StoreError("no sketches were measured", where=str(store.folder), do="collect into another --out")
    usable = np.fromiter((status.usable for status in store.status), dtype=bool, count=store.size)
    if len(bad := np.flatnonzero(~usable[at])):
        row = at[bad[0]]
        raise StoreError(
            "this row has no sketch",
            where=f"row {store.ids[row]}",
            got=f"status {store.status[row]}: {store.reason[row]}",
            expected="a row that was measured",
            do="leave rows out that are not usable",
        )
    return StoredSketches(store, np.asarray(at, dtype=np.int64))
