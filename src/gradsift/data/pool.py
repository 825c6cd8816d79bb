"""The pool: every input row with its id, its status and its bytes.

A row's id is its ``id`` column, or a hash of the line it would be written out as (``raw``), so the same bytes have the
same id wherever they stand. Checks, first failing one wins: DUPLICATE, MALFORMED, EMPTY.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from gradsift.data import hub, tables
from gradsift.data.formats import FORMATS, normalise
from gradsift.data.lines import Kind, Opened, Parsed, RawRows, to_line
from gradsift.data.readers import ARCHIVES, SUFFIXES, compressed, read_text_file
from gradsift.errors import DataError
from gradsift.recipe import Format, SourceConfig
from gradsift.types import Example, Row, RowStatus

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


@dataclass(frozen=True)
class Pool:
    """All rows of all files, in input order.

    Args:
        rows: N rows, files in the order given.
        files: what was read from each source.
        parts: the rows of each file as they stand there, aligned with ``files``.
    """

    rows: tuple[Row, ...]
    files: tuple[PoolFile, ...]
    parts: tuple[RawRows, ...] = field(repr=False)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Position of each file's first row, and N at the end."""
        return tuple(accumulate((file.num_rows for file in self.files), initial=0))

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Position of each id."""
        return {row.id: i for i, row in enumerate(self.rows)}

    @cached_property
    def counts(self) -> Mapping[RowStatus, int]:
        """Rows per status; the values add up to N."""
        return Counter(row.status for row in self.rows)

    def file_of(self, i: int) -> int:
        """Find the file of a row.

        Args:
            i: position in the pool.

        Returns:
            Its index in ``files``.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= i < len(self.rows):
            raise IndexError(f"row {i} of {len(self.rows)}")
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


@dataclass(slots=True)
class _Seen:
    """Ids met so far: given ones, and hashes of rows without one."""

    given: dict[str, Row] = field(default_factory=dict)
    hashed: dict[tuple[str, bool], Row] = field(default_factory=dict)
    copies: Counter[str] = field(default_factory=Counter)


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
    rows: list[Row] = []
    files: list[PoolFile] = []
    parts: list[RawRows] = []
    seen = _Seen()
    for source in sources:
        opened = open_source(source.path)
        shapes: Counter[str] = Counter()
        for position, parsed in enumerate(opened.rows.parsed()):
            place = Row("", source.label, source.path, position, RowStatus.OK)
            row, name = _judge(place, parsed, fmt)
            shapes[name] += bool(name)
            rows.append(_identify(row, parsed, opened, seen, dedup))
        counted = {name: shapes[name] for name in FORMATS if shapes[name]}
        files.append(
            PoolFile(source.label, source.path, opened.kind, opened.sha256, len(opened.rows), counted, opened.revision)
        )
        parts.append(opened.rows)
    _refuse_collisions(rows, seen)
    return Pool(tuple(rows), tuple(files), tuple(parts))


def _judge(place: Row, parsed: Parsed, fmt: Format) -> tuple[Row, str]:
    """Give a row its status and its given id, if any; also name its shape."""
    if parsed.blank:
        return replace(place, status=RowStatus.EMPTY, reason="the line is blank"), ""
    if parsed.value is None:
        return replace(place, status=RowStatus.MALFORMED, reason=parsed.problem), ""
    given, problem = _given_id(parsed.value)
    found = normalise(parsed.value, fmt)
    if problem:
        return replace(place, status=RowStatus.MALFORMED, reason=problem), found.format
    place = replace(place, id=given, status=found.status, reason=found.reason)
    if found.shape is None or found.fields is None:
        return place, found.format
    return replace(place, example=Example(given, found.shape, found.fields)), found.format


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


def _identify(row: Row, parsed: Parsed, opened: Opened, seen: _Seen, dedup: str) -> Row:
    """Give the row its id and mark it when it is a later exact copy.

    Rows with a given id need no hash: an exact copy of one repeats the id, which is refused. Unreadable rows of CSV
    files and tables have a stand-in for a line, which must not count as a copy of a readable row.
    """
    if row.id:
        if row.id in seen.given:
            raise _repeated(row, seen.given[row.id], "an id is given twice")
        seen.given[row.id] = row
        return row
    readable = not parsed.problem
    # A table's line is its value written out: writing the one at hand spares converting the row a second time.
    in_table = isinstance(opened.rows, tables.TableRows) and parsed.value is not None
    line = to_line(parsed.value) if in_table else opened.rows.line(row.row)
    digest = hashlib.blake2b(line, digest_size=16).hexdigest()
    seen.copies[digest] += 1
    name = digest if seen.copies[digest] == 1 else f"{digest}-{seen.copies[digest]}"
    first = seen.hashed.get((digest, readable))
    if first is None:
        row = replace(row, id=name, example=row.example and replace(row.example, id=name))
        seen.hashed[digest, readable] = row
        return row
    example = first.example and replace(first.example, id=name)  # copies share the columns of the first
    row = replace(row, id=name, example=example, copy_of=first.id)
    if dedup == "keep":
        return row
    return replace(row, status=RowStatus.DUPLICATE, reason=f"exact copy of row {first.row} of {first.file}")


def _refuse_collisions(rows: Sequence[Row], seen: _Seen) -> None:
    for row in rows:
        other = seen.given.get(row.id)
        if other is not None and other is not row:
            raise _repeated(row, other, "a given id equals a generated one")


def _repeated(row: Row, other: Row, what: str) -> DataError:
    return DataError(
        what,
        where=f"row {other.row} of {other.file} and row {row.row} of {row.file} (counted from 0)",
        got=repr(row.id)[:200],
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
    if any(row.status.usable for row in pool.rows):
        return
    counts = ", ".join(f"{count} {status}" for status, count in pool.counts.items()) or "0 rows"
    reasons = list(dict.fromkeys(row.reason for row in pool.rows if row.status is not RowStatus.DUPLICATE))[:3]
    raise DataError(
        "no row of the pool can be used",
        where=", ".join(file.path for file in pool.files),
        got=counts + (f": {'; '.join(reasons)}" if reasons else ""),
        expected=f"rows in one of the shapes {', '.join(FORMATS)}",
        do="correct the rows, or name their shape with --format",
    )


def open_source(source: str) -> Opened:
    """Open a local file, a ``save_to_disk`` folder or a hub id.

    Args:
        source: path or hub id as given.

    Returns:
        The file's rows.

    Raises:
        DataError: there is no such file, its kind is not known, or it cannot be read.
    """
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
