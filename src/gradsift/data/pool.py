"""The pool: every input row with its id, its status and its bytes.

A row's id is its ``id`` column, or a hash of the line it would be written out as (``raw``), so the same bytes have the
same id wherever they stand. Checks, first failing one wins: DUPLICATE, MALFORMED, EMPTY.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
from jaxtyping import Int64, UInt8

from gradsift.data import hub, tables
from gradsift.data.formats import FORMATS, normalise
from gradsift.data.ids import Clash, Ids, IdsBuilder
from gradsift.data.lines import Kind, Opened, Parsed, RawRows, to_line
from gradsift.data.readers import ARCHIVES, SUFFIXES, compressed, read_text_file
from gradsift.data.remote import URL, local_copy
from gradsift.data.spool import Remarks, Spool
from gradsift.errors import DataError
from gradsift.recipe import Format, SourceConfig
from gradsift.types import Example, Row, RowStatus, Shape

STATUSES, SHAPES = tuple(RowStatus), get_args(Shape)  # columns hold their numbers
# A missing file with one of these endings is a missing file: the hub is not asked about it.
OTHER_FILES = (".txt", ".tsv", ".md", ".xls", ".xlsx", ".xml", ".yaml", ".yml", ".pkl", ".npy", ".npz", ".pt", ".bin")


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


def open_source(source: str) -> Opened:
    """Open a local file, a ``save_to_disk`` folder, a URL or a hub id.

    Args:
        source: path, URL or hub id as given.

    Returns:
        The file's rows.

    Raises:
        DataError: there is no such file, its kind is not known, or it cannot be read.
    """
    if URL.fullmatch(source):
        return _open_url(source)
    path = Path(source)
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.exists():
            return _open_file(path, suffix)
    except OSError as error:
        raise DataError("the file cannot be read", where=repr(source), got=str(error), do="check the path") from None
    if suffix not in (*SUFFIXES, *ARCHIVES, *OTHER_FILES):
        opened = hub.read_hub(source)
        if opened is not None:
            return opened
    raise DataError(
        "the file does not exist",
        where=source,
        expected=f"a file ({', '.join(SUFFIXES)}) or a hub id (org/name, org/name:split)",
        do="check the path",
    )


def _open_url(url: str) -> Opened:
    path = local_copy(url)
    try:
        return open_source(str(path))
    except DataError as error:  # a person knows the URL, not the copy
        raise DataError(error.what, where=url, got=error.got, expected=error.expected, do=error.do) from None


def _open_folder(path: Path) -> Opened:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return tables.read_table_file(path, "arrow")
    raise DataError(
        "a folder is only read when datasets wrote it with save_to_disk",
        where=str(path),
        expected="a folder with state.json and data-*.arrow, or one file",
        do="pass the files themselves, one --pool each",
    )


def _open_file(path: Path, suffix: str) -> Opened:
    if not path.is_file():
        raise DataError("this is not a regular file", where=str(path), do="write the rows to a file first")
    if suffix in ARCHIVES:
        raise compressed(path)
    kind = SUFFIXES.get(suffix)
    if kind is None:
        raise DataError(
            "the kind of file is not known",
            where=str(path),
            got=suffix or "no extension",
            expected=", ".join(SUFFIXES),
            do="convert the file or rename it to its true kind",
        )
    if kind in ("parquet", "arrow"):
        return tables.read_table_file(path, kind)
    return read_text_file(path, kind)
