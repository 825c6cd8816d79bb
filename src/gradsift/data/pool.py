"""The pool: every input row with its id, its status and its bytes.

A row's id is its ``id`` column, or a hash of the line it would be written out as (``raw``), so the same bytes have the
same id wherever they stand. Checks, first failing one wins: DUPLICATE, MALFORMED, EMPTY.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from gradsift.data.formats import FORMATS, normalise
from gradsift.data.ids import Clash, IdsBuilder
from gradsift.data.lines import Parsed, RawRows, to_line
from gradsift.data.opening import open_source as open_source
from gradsift.data.rows import SHAPES, STATUSES, PoolColumns, PoolFile
from gradsift.data.rows import Pool as Pool
from gradsift.data.spool import Remarks, Spool
from gradsift.errors import DataError
from gradsift.recipe import Format, SourceConfig
from gradsift.types import RowStatus, Shape


@dataclass(slots=True)
class _Judged:
    """What is known of a row before its copies are."""

    status: RowStatus = RowStatus.OK
    reason: str = ""
    given: str = ""
    shape: Shape | None = None
    format: str = ""


class _Columns:
    """Grows the columns row by row."""

    def __init__(self) -> None:
        self.status, self.shape, self.readable = bytearray(), bytearray(), bytearray()
        self.ids, self.reasons, self.at = IdsBuilder(), Spool(), array("q")

    def add(self, row: _Judged, parsed: Parsed, rows: RawRows, position: int) -> None:
        """Add a row.

        Rows with a given id need no line: an exact copy of one repeats the id, which is refused. Unreadable rows of CSV
        files and tables have a stand-in for a line, which must not count as a copy of a readable row.
        """
        if row.reason:
            self.reasons.append(row.reason.encode("utf-8", "surrogatepass"))
            self.at.append(len(self.status))
        self.status.append(STATUSES.index(row.status))
        self.shape.append(0 if row.shape is None else SHAPES.index(row.shape) + 1)
        self.readable.append(not parsed.problem)
        if row.given:
            self.ids.add_given(row.given)
        elif parsed.line is not None:
            self.ids.add_line(parsed.line)
        else:  # a table's line is its value written out
            self.ids.add_line(rows.line(position) if parsed.value is None else to_line(parsed.value))

    def seal(self, fmt: Format, dedup: str) -> tuple[PoolColumns, Clash | None]:
        """Find the copies."""
        ids, first, clash = self.ids.seal(np.frombuffer(self.readable, dtype=np.bool_))
        status, shape = (np.frombuffer(codes, dtype=np.uint8).copy() for codes in (self.status, self.shape))
        copies = np.flatnonzero(first >= 0)
        shape[copies] = shape[first[copies]]
        if dedup == "drop":
            status[copies] = STATUSES.index(RowStatus.DUPLICATE)
        reasons = Remarks(np.frombuffer(self.at, dtype=np.int64), self.reasons.seal())
        return PoolColumns(ids, first, status, shape, reasons, fmt), clash


def read_pool(
    sources: Sequence[SourceConfig], *, fmt: Format = "auto", dedup: Literal["drop", "keep"] = "drop"
) -> Pool:
    """Read files and hub data sets into one pool.

    A file that cannot be read, an id that is given twice and a given id that equals a generated one are refused with a
    ``DataError``; nothing else about a row ever is.

    Args:
        sources: labels and paths, in order.
        fmt: the shape every row must have, or auto.
        dedup: drop gives later exact copies the status DUPLICATE; keep leaves them as their first.

    Returns:
        Every row with one status of OK, DUPLICATE, MALFORMED or EMPTY.
    """
    columns = _Columns()
    files: list[PoolFile] = []
    parts: list[RawRows] = []
    for source in sources:
        opened = open_source(source.path)
        shapes: Counter[str] = Counter()
        for position, parsed in enumerate(opened.rows.parsed()):
            row = _judge(parsed, fmt)
            shapes[row.format] += bool(row.format)
            columns.add(row, parsed, opened.rows, position)
        counted = {name: shapes[name] for name in FORMATS if shapes[name]}
        files.append(
            PoolFile(source.label, source.path, opened.kind, opened.sha256, len(opened.rows), counted, opened.revision)
        )
        parts.append(opened.rows)
    found, clash = columns.seal(fmt, dedup)
    pool = Pool(found, tuple(files), tuple(parts))
    if clash is not None:
        raise _repeated(pool, clash)
    return pool


def _judge(parsed: Parsed, fmt: Format) -> _Judged:
    """Give a row its status and its given id, if any; also name its shape."""
    if parsed.blank:
        return _Judged(RowStatus.EMPTY, "the line is blank")
    if parsed.value is None:
        return _Judged(RowStatus.MALFORMED, parsed.problem)
    given, problem = _given_id(parsed.value)
    found = normalise(parsed.value, fmt)
    if problem:
        return _Judged(RowStatus.MALFORMED, problem, format=found.format)
    shape = found.shape if found.fields is not None else None
    return _Judged(found.status, found.reason, given, shape, found.format)


def _given_id(value: Mapping[str, Any]) -> tuple[str, str]:
    """Read the ``id`` column: the id, or a problem; neither when it is absent or null."""
    given = value.get("id")
    if given is None:
        return "", ""
    if isinstance(given, bool) or not isinstance(given, str | int):
        return "", f"id is a {type(given).__name__}, expected a string or a whole number"
    given = str(given)
    if not given:
        return "", "id is an empty string"
    try:
        given.encode("utf-8")
    except UnicodeEncodeError:
        return "", "id holds a lone surrogate, which no table can store"
    return given, ""


def _repeated(pool: Pool, clash: Clash) -> DataError:
    places = []
    for i in (clash.other, clash.row):
        part = pool.file_of(i)
        places.append(f"row {i - pool.starts[part]} of {pool.files[part].path}")
    return DataError(
        "an id is given twice" if clash.given else "a given id equals a generated one",
        where=f"{places[0]} and {places[1]} (counted from 0)",
        got=repr(pool.index.at(clash.row))[:200],
        expected="ids that are unique in the whole pool",
        do="rename one of them, or drop the id column and let gradsift hash the rows",
    )


def require_usable(pool: Pool) -> None:
    """Refuse a pool in which no row can be selected.

    Args:
        pool: the rows as read.

    Raises:
        DataError: no row is OK; the counts and the first few reasons are in the message.
    """
    if any(status.usable for status in pool.counts):
        return
    counts = ", ".join(f"{count} {status}" for status, count in pool.counts.items()) or "0 rows"
    own = np.flatnonzero(pool.columns.status != STATUSES.index(RowStatus.DUPLICATE))
    reasons = list(islice(dict.fromkeys(pool.columns.reasons[int(i)] for i in own), 3))
    raise DataError(
        "no row of the pool can be used",
        where=", ".join(file.path for file in pool.files),
        got=counts + (f": {'; '.join(reasons)}" if reasons else ""),
        expected=f"rows in one of the shapes {', '.join(FORMATS)}",
        do="correct the rows, or name their shape with --format",
    )
