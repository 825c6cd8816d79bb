"""Token rows over a table of records: rows that may be kept by the million, and what is done to many of them at once (ours)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, overload

import numpy as np
from jaxtyping import Int32, Int64

from gradsift.data.rows import STATUSES, Pool
from gradsift.data.show import plain_text
from gradsift.data.tokens import TokenTable, content_hash
from gradsift.types import RowStatus, TokenRow

_USABLE = np.array([status.usable for status in STATUSES])


def content_of(row: TokenRow) -> str:
    """Give a row's content hash, without reading its tokens where it is known.

    Args:
        row: any token row.

    Returns:
        What :func:`content_hash` gives.
    """
    return row.content if isinstance(row, StoredRow) else content_hash(row.input_ids, row.trained)


def places(pool: Pool, rows: Sequence[TokenRow]) -> Int64[np.ndarray, " n"]:
    """Find rows in their pool.

    Args:
        pool: the pool.
        rows: n of its token rows.

    Returns:
        int64 [n] positions.
    """
    return rows.at if isinstance(rows, TokenRows) else pool.index.find([row.id for row in rows])


def texts_of(pool: Pool, rows: Sequence[TokenRow]) -> list[str]:
    """Read rows' texts.

    Args:
        pool: the pool.
        rows: n of its token rows.

    Returns:
        n plain texts, without any template.
    """
    return [plain_text(pool.row(int(i))) for i in places(pool, rows)]


def lengths(rows: Sequence[TokenRow]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Count rows' tokens.

    Args:
        rows: n token rows.

    Returns:
        int64 [n] tokens of each row, and int64 [n] trained tokens.
    """
    if isinstance(rows, TokenRows):
        return rows.num_tokens.astype(np.int64), rows.num_trained.astype(np.int64)
    pairs = np.array([(row.num_tokens, row.num_trained) for row in rows], dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0].copy(), pairs[:, 1].copy()


def pick(rows: Sequence[TokenRow], at: Int64[np.ndarray, " k"]) -> Sequence[TokenRow]:
    """Choose rows by their indices.

    Args:
        rows: any token rows.
        at: int64 [k] indices.

    Returns:
        These rows.
    """
    return rows.take(rows.at[at]) if isinstance(rows, TokenRows) else [rows[int(i)] for i in at]


def sorted_by_id(rows: Sequence[TokenRow]) -> Sequence[TokenRow]:
    """Sort rows.

    Args:
        rows: any token rows.

    Returns:
        The same rows in the order of their ids.
    """
    return rows.by_id() if isinstance(rows, TokenRows) else sorted(rows, key=lambda row: row.id)


def among(rows: Sequence[TokenRow], ids: Set[str]) -> Sequence[TokenRow]:
    """Keep the rows with some ids.

    Args:
        rows: any token rows.
        ids: the ids; unknown ones are no error.

    Returns:
        These rows, in their order.
    """
    return rows.among(ids) if isinstance(rows, TokenRows) else tuple(row for row in rows if row.id in ids)


class StoredRow(TokenRow):
    """A token row of a table: its arrays are read whenever they are asked for, so that it may be kept.

    Made by :class:`TokenRows`; ``dataclasses.replace`` and pickle make an ordinary token row of it.
    """

    __slots__ = ("_at", "_table")

    def __new__(cls, *args: Any, **fields: Any) -> TokenRow:  # type: ignore[misc] - see the docstring
        """Make an ordinary row."""
        return TokenRow(*args, **fields)

    @staticmethod
    def of(table: TokenTable, at: int) -> StoredRow:
        """Point at a row.

        Args:
            table: that holds it.
            at: its position.

        Returns:
            The row.
        """
        row = object.__new__(StoredRow)
        object.__setattr__(row, "_table", table)
        object.__setattr__(row, "_at", at)
        return row

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("id", "input_ids", "trained", "num_untruncated", "status", "reason", "template")
        return TokenRow, tuple(getattr(self, name) for name in names)

    def __repr__(self) -> str:
        return f"StoredRow({self.id!r}, {self.num_tokens} tokens, {self.status})"

    id = property(lambda self: self._table.ids.at(self._at))  # type: ignore[assignment]
    input_ids = property(lambda self: self._table.arrays(self._at)[0])  # type: ignore[assignment]
    trained = property(lambda self: self._table.arrays(self._at)[1])  # type: ignore[assignment]
    template = property(lambda self: self._table.arrays(self._at)[2])  # type: ignore[assignment]
    reason = property(lambda self: self._table.reason(self._at))  # type: ignore[assignment]
    content = property(lambda self: self._table.content(self._at))
    status = property(lambda self: STATUSES[self._table.columns.status[self._at]])  # type: ignore[assignment]
    num_untruncated = property(  # type: ignore[assignment]
        lambda self: int(self._table.columns.num_untruncated[self._at])
    )
    top_id = property(lambda self: int(self._table.columns.top[self._at]))  # type: ignore[assignment]
    num_tokens = property(lambda self: int(self._table.columns.num_tokens[self._at]))  # type: ignore[assignment]
    num_trained = property(lambda self: int(self._table.columns.num_trained[self._at]))  # type: ignore[assignment]


class TokenRows(Sequence[TokenRow]):
    """Some rows of a table, in an order.

    Args:
        table: all rows.
        at: int64 [n] which of them; None for all in their order.
    """

    def __init__(self, table: TokenTable, at: Int64[np.ndarray, " n"] | None = None) -> None:
        self.table = table
        self.at = np.arange(len(table.columns.status)) if at is None else at

    def __len__(self) -> int:
        return len(self.at)

    @overload
    def __getitem__(self, i: int) -> StoredRow: ...
    @overload
    def __getitem__(self, i: slice) -> TokenRows: ...
    def __getitem__(self, i: int | slice) -> StoredRow | TokenRows:
        return self.take(self.at[i]) if isinstance(i, slice) else StoredRow.of(self.table, int(self.at[i]))

    def __iter__(self) -> Iterator[TokenRow]:
        return (StoredRow.of(self.table, int(i)) for i in self.at)

    def take(self, at: Int64[np.ndarray, " k"]) -> TokenRows:
        """Choose rows of the table.

        Args:
            at: int64 [k] positions in the table.

        Returns:
            These rows.
        """
        return TokenRows(self.table, at)

    @cached_property
    def usable(self) -> TokenRows:
        """The rows that may be measured or selected."""
        return self.take(self.at[_USABLE[self.table.columns.status[self.at]]])

    @property
    def counts(self) -> Mapping[RowStatus, int]:
        """Rows per status."""
        codes, counts = np.unique(self.table.columns.status[self.at], return_counts=True)
        return Counter({STATUSES[code]: int(count) for code, count in zip(codes, counts, strict=True)})

    @property
    def num_tokens(self) -> Int32[np.ndarray, " n"]:
        """int32 [n]."""
        return self.table.columns.num_tokens[self.at]

    @property
    def num_trained(self) -> Int32[np.ndarray, " n"]:
        """int32 [n]."""
        return self.table.columns.num_trained[self.at]

    def by_id(self) -> TokenRows:
        """Give the same rows in the order of their ids."""
        return self.take(self.at[np.argsort(self.table.ids.rank[self.at], kind="stable")])

    def by_length(self) -> Int64[np.ndarray, " n"]:
        """int64 [n] indices that sort the rows by (length, id)."""
        return np.lexsort((self.table.ids.rank[self.at], self.num_tokens))

    def among(self, ids: Collection[str]) -> TokenRows:
        """Keep the rows with some ids, in their order.

        Args:
            ids: the ids; unknown ones are no error.

        Returns:
            These rows.
        """
        mask = np.zeros(len(self.table.columns.status), dtype=bool)
        found = self.table.ids.find(list(ids))
        mask[found[found >= 0]] = True
        return self.take(self.at[mask[self.at]])
