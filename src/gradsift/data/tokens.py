"""Tokens that are not held: what is asked often (lengths, statuses, hashes) in columns, the rest in records (ours).

A row's record is its ids (int32), its mask, where it was looked up the mask of the template's tokens, and its reason. The
content hash that names the row in the store is also the checksum of ids and mask; the rest has a CRC. A record that does not
agree is refused before its first number is used.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, Shaped, UInt8, UInt32

from gradsift.data.ids import SIZE
from gradsift.data.rows import STATUSES, Pool
from gradsift.data.spool import Handle
from gradsift.errors import DataError
from gradsift.manifest import hash_parts
from gradsift.types import RowStatus, TokenRow

_KEPT = 128  # rows whose arrays are kept: a micro-batch reads each of its rows more than once


def content_hash(input_ids: Int[np.ndarray, " T"], trained: Bool[np.ndarray, " T"]) -> str:
    """Hash what is measured of a row: its token ids and which of them carry loss.

    Args:
        input_ids: integer [T] token ids.
        trained: bool [T], True where the label is the token.

    Returns:
        32 hex digits; a changed token or mask gives another hash.
    """
    return hash_parts([input_ids.astype("<i4").tobytes(), trained.astype(np.uint8).tobytes()])


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """What is held of every token row, 42 bytes.

    Args:
        status: uint8 [N] number of the status in ``gradsift.data.pool.STATUSES``.
        num_tokens: int32 [N].
        num_trained: int32 [N].
        num_untruncated: int32 [N].
        top: int32 [N] largest token id, -1 for rows without tokens.
        content: S16 [N] content hashes.
        has_template: uint8 [N] whether the template's tokens were looked up.
        reason_bytes: int32 [N] length of the reason.
        tail_crc: uint32 [N] CRC of what follows the mask.
    """

    status: UInt8[np.ndarray, " N"]
    num_tokens: Int32[np.ndarray, " N"]
    num_trained: Int32[np.ndarray, " N"]
    num_untruncated: Int32[np.ndarray, " N"]
    top: Int32[np.ndarray, " N"]
    content: Shaped[np.ndarray, " N"]
    has_template: UInt8[np.ndarray, " N"]
    reason_bytes: Int32[np.ndarray, " N"]
    tail_crc: UInt32[np.ndarray, " N"]

    @property
    def sizes(self) -> Int64[np.ndarray, " N"]:
        """int64 [N] bytes of each record."""
        return self.num_tokens.astype(np.int64) * (5 + self.has_template) + self.reason_bytes


DTYPES = {"status": np.uint8, "content": f"S{SIZE}", "has_template": np.uint8, "tail_crc": np.uint32}  # others int32


def pack(row: TokenRow) -> tuple[bytes, tuple[Any, ...]]:
    """Write a row's record.

    Args:
        row: any token row.

    Returns:
        The record, and the row's entries of :class:`TokenColumns` in their order.
    """
    head = [row.input_ids.astype("<i4").tobytes(), row.trained.astype(np.uint8).tobytes()]
    reason = row.reason.encode("utf-8", "surrogatepass")
    tail = (b"" if row.template is None else row.template.astype(np.uint8).tobytes()) + reason
    values = (
        STATUSES.index(row.status), row.num_tokens, row.num_trained, row.num_untruncated, row.top_id,
        bytes.fromhex(hash_parts(head)), row.template is not None, len(reason), zlib.crc32(tail),
    )  # fmt: skip
    return b"".join((*head, tail)), values


@dataclass(frozen=True, eq=False)
class TokenPart:
    """The token rows of one file.

    Args:
        columns: of its rows.
        body: the records one after the other, or the file that holds them so.
        where: what a person may delete when the file is damaged; empty for records in memory.
    """

    columns: TokenColumns
    body: bytes | Handle = field(repr=False)
    where: str = ""


class TokenTable:
    """All token rows of a pool.

    Args:
        pool: the rows as read; says why a row was not tokenized.
        parts: the rows of each file, in order.
    """

    def __init__(self, pool: Pool, parts: Sequence[TokenPart]) -> None:
        self.ids, self._why = pool.index, pool.reason
        self._bodies = [(part.body, part.where) for part in parts]
        self._first = tuple(accumulate((len(part.columns.status) for part in parts), initial=0))
        names = TokenColumns.__dataclass_fields__
        joined = {n: np.concatenate([np.zeros(0, DTYPES.get(n, np.int32)), *(getattr(p.columns, n) for p in parts)])
                  for n in names}  # fmt: skip
        self.columns = TokenColumns(**joined)
        starts = [np.cumsum(part.columns.sizes) - part.columns.sizes for part in parts]
        self._starts = np.concatenate([np.zeros(0, np.int64), *starts])
        self._told: Mapping[int, str] | None = None
        self._kept: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = OrderedDict()

    def with_statuses(self, told: Mapping[int, tuple[RowStatus, str]]) -> TokenTable:
        """Give some rows another status.

        Args:
            told: position -> status and reason.

        Returns:
            A table over the same records.
        """
        other = object.__new__(TokenTable)
        other.__dict__.update(self.__dict__)
        status = self.columns.status.copy()
        for i, (new, _) in told.items():
            status[i] = STATUSES.index(new)
        other.columns = replace(self.columns, status=status)
        other._told = {**(self._told or {}), **{i: reason for i, (_, reason) in told.items()}}
        return other

    def arrays(self, i: int) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"], Bool[np.ndarray, " T"] | None]:
        """Read a row's tokens.

        Args:
            i: position.

        Returns:
            int32 [T] token ids, bool [T] mask, and bool [T] template tokens or None; read-only.

        Raises:
            DataError: the record is damaged.
        """
        found = self._kept.get(i)
        if found is None:
            found = self._kept[i] = self._read(i)[0]
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

    def reason(self, i: int) -> str:
        """Read a row's reason.

        Args:
            i: position.

        Returns:
            The sentence, empty for OK.

        Raises:
            DataError: the record is damaged.
        """
        if self._told and i in self._told:
            return self._told[i]
        return self._read(i)[1] if self.columns.reason_bytes[i] else self._why(i)

    def _read(self, i: int) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray | None], str]:
        body, where = self._bodies[bisect_right(self._first, i) - 1]
        c, start = self.columns, int(self._starts[i])
        num, more = int(c.num_tokens[i]), bool(c.has_template[i])
        size = num * (5 + more) + int(c.reason_bytes[i])
        data = body[start : start + size] if isinstance(body, bytes) else body.read(start, size)
        head, tail = [data[: 4 * num], data[4 * num : 5 * num]], data[5 * num :]
        if len(data) != size or hash_parts(head) != self.content(i) or zlib.crc32(tail) != c.tail_crc[i]:
            raise damaged(where, f"record of row {self.ids.at(i)}")
        template = np.frombuffer(tail[:num], dtype=np.bool_) if more else None
        arrays = np.frombuffer(head[0], dtype="<i4").astype(np.int32, copy=False), np.frombuffer(head[1], np.bool_)
        return (*arrays, template), tail[num * more :].decode("utf-8", "surrogatepass")

    def content(self, i: int) -> str:
        """Give a row's content hash.

        Args:
            i: position.

        Returns:
            32 hex digits.
        """
        return bytes(self.columns.content[i]).ljust(SIZE, b"\0").hex()


def damaged(where: str, what: str) -> DataError:
    """Build the refusal of tokens that are not those that were written.

    Args:
        where: folder of the cache that holds them.
        what: which part of it.

    Returns:
        The error, to be raised.
    """
    return DataError(
        "tokens on the disk are damaged",
        where=where,
        got=f"{what} does not agree with its checksum",
        expected="the bytes that were written",
        do=f"delete {where} and run the same command again; check the disk",
    )
