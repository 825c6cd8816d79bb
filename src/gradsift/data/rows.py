"""The rows of a pool, none of them held: columns of numbers, and where each row is read again."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, repeat
from typing import get_args, overload

import numpy as np
from jaxtyping import Int64, UInt8

from gradsift.data.formats import normalise
from gradsift.data.ids import Ids
from gradsift.data.lines import Kind, Parsed, RawRows
from gradsift.data.spool import Remarks
from gradsift.recipe import Format
from gradsift.types import Example, Row, RowStatus, Shape

STATUSES, SHAPES = tuple(RowStatus), get_args(Shape)  # columns hold their numbers


@dataclass(frozen=True)
class PoolFile:
    """What was read from one source.

    Args:
        label: its source label.
        path: file or hub id as given.
        kind: how it was read.
        sha256: digest of the file's bytes (for folders and hub data sets: of their Arrow files).
        num_rows: rows, whatever their status.
        shapes: rows per detected shape (``messages``, ``prompt_completion``, ``sharegpt``, ``text``, ``alpaca``), in
            the order of detection; rows of no shape are not counted.
        revision: commit of a hub data set, otherwise empty.
    """

    label: str
    path: str
    kind: Kind
    sha256: str
    num_rows: int
    shapes: Mapping[str, int]
    revision: str = ""


@dataclass(frozen=True, eq=False)
class PoolColumns:
    """What is held of every row, 46 bytes in all; the row itself is read again when it is needed.

    Args:
        ids: id -> position.
        first: int64 [N] position of the first exact copy, -1 for rows that are no later copy.
        status: uint8 [N] number of the status in ``STATUSES``.
        shape: uint8 [N] number of the example's shape in ``SHAPES``; 0 for rows without an example.
        reasons: sentences for rows that are neither OK nor DUPLICATE.
        fmt: the shape that was asked for, or auto.
    """

    ids: Ids
    first: Int64[np.ndarray, " N"]
    status: UInt8[np.ndarray, " N"]
    shape: UInt8[np.ndarray, " N"]
    reasons: Remarks
    fmt: Format


@dataclass(frozen=True, eq=False)
class Pool:
    """All rows of all files, in input order.

    Args:
        columns: what is held of every row.
        files: what was read from each source.
        parts: the rows of each file as they stand there, aligned with ``files``.
    """

    columns: PoolColumns = field(repr=False)
    files: tuple[PoolFile, ...]
    parts: tuple[RawRows, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.columns.status)

    @property
    def rows(self) -> PoolRows:
        """N rows, files in the order given, each read when it is asked for; walk them in order where possible."""
        return PoolRows(self)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Position of each file's first row, and N at the end."""
        return tuple(accumulate((file.num_rows for file in self.files), initial=0))

    @property
    def index(self) -> Ids:
        """Position of each id; walking it gives the ids in order."""
        return self.columns.ids

    @property
    def first(self) -> Int64[np.ndarray, " N"]:
        """int64 [N] position of a row's first exact copy, its own where it is no later copy."""
        first = self.columns.first
        return np.where(first < 0, np.arange(len(first)), first)

    @cached_property
    def copies(self) -> Mapping[str, str]:
        """Id of every later exact copy -> id of the first one."""
        first = self.columns.first
        return {self.index.at(int(i)): self.index.at(int(first[i])) for i in np.flatnonzero(first >= 0)}

    def labels(self) -> Iterator[str]:
        """N source labels, one after the other."""
        return chain.from_iterable(repeat(file.label, file.num_rows) for file in self.files)

    def label(self, i: int) -> str:
        """Give a row's source label.

        Args:
            i: position in the pool.

        Returns:
            The label of its file.
        """
        return self.files[self.file_of(i)].label

    @property
    def shapes(self) -> frozenset[Shape]:
        """Shapes of the rows that have an example."""
        return frozenset(SHAPES[code - 1] for code in np.unique(self.columns.shape) if code)

    @cached_property
    def counts(self) -> Mapping[RowStatus, int]:
        """Rows per status; the values add up to N."""
        codes, at, counts = np.unique(self.columns.status, return_index=True, return_counts=True)
        return Counter({STATUSES[codes[k]]: int(counts[k]) for k in np.argsort(at)})

    def file_of(self, i: int) -> int:
        """Find the file of a row.

        Args:
            i: position in the pool.

        Returns:
            Its index in ``files``.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return bisect_right(self.starts, i) - 1

    def raw(self, i: int) -> bytes:
        """Give a row's JSON line as it is written out, without a newline.

        Args:
            i: position in the pool.

        Returns:
            The input bytes for JSON Lines, otherwise one JSON object with equal values. Rows that are MALFORMED may
            give bytes that are no JSON line; they are never written out.
        """
        part = self.file_of(i)
        return self.parts[part].line(i - self.starts[part])

    def row(self, i: int, parsed: Parsed | None = None) -> Row:
        """Give a row with its example.

        Args:
            i: position in the pool.
            parsed: its columns where they are at hand.

        Returns:
            The row.
        """
        part, name = self.file_of(i), self.columns.ids.at(i)
        file, first = self.files[part], int(self.columns.first[i])
        status, example = STATUSES[self.columns.status[i]], None
        if self.columns.shape[i]:
            found = parsed or self.parts[part].at(i - self.starts[part])
            assert found.value is not None
            normal = normalise(found.value, self.columns.fmt)
            assert normal.shape is not None
            assert normal.fields is not None
            example = Example(name, normal.shape, normal.fields)
        copy_of = None if first < 0 else self.columns.ids.at(first)
        return Row(name, file.label, file.path, i - self.starts[part], status, self.reason(i), example, copy_of)

    def reason(self, i: int) -> str:
        """Say why a row is not OK.

        Args:
            i: position in the pool.

        Returns:
            A sentence, empty for OK.
        """
        if self.columns.status[i] != STATUSES.index(RowStatus.DUPLICATE):
            return self.columns.reasons[i]
        first = int(self.columns.first[i])
        owner = self.file_of(first)
        return f"exact copy of row {first - self.starts[owner]} of {self.files[owner].path}"


class PoolRows(Sequence[Row]):
    """The rows of a pool, none of them held.

    Args:
        pool: whose rows.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __len__(self) -> int:
        return len(self._pool)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self._pool.row(k) for k in range(*i.indices(len(self)))]
        return self._pool.row(i + len(self) if i < 0 else i)

    def __iter__(self) -> Iterator[Row]:
        """Read every file once, in order."""
        return chain.from_iterable(map(self.of_file, range(len(self._pool.files))))

    def of_file(self, number: int) -> Iterator[Row]:
        """Read the rows of one file, in order.

        Args:
            number: of the file.

        Yields:
            Its rows.
        """
        start = self._pool.starts[number]
        for position, parsed in enumerate(self._pool.parts[number].parsed()):
            yield self._pool.row(start + position, parsed)
