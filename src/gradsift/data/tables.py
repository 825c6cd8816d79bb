"""Parquet files, Arrow files, ``save_to_disk`` folders and hub data sets: rows kept as Arrow tables.

The table itself goes back out as Parquet with its own schema. As JSON, values that JSON lacks follow one rule each:
binary is base64 (RFC 4648); timestamps, dates and times are ISO 8601 with every digit of their unit, an instant with a
time zone in UTC with Z; durations are ISO 8601 seconds (PT1.5S); decimals are strings of their digits; a map is a list
of [key, value] pairs. A column of the type ``arrow.json`` (written by datasets) is decoded.
"""

from __future__ import annotations

import base64
import hashlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.data import spool
from gradsift.data.cache import disk_errors
from gradsift.data.lines import MAX_DEPTH, Kind, Opened, Parsed, parse_line, to_line, too_deep
from gradsift.data.spool import BLOCK
from gradsift.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024
SPOOL_ROWS = 8192  # rows that are decoded at a time
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True)
class TableRows:
    """Rows of one Arrow table, turned into JSON only when asked.

    Args:
        table: the whole file; its columns lie in ``mapping`` where there is one.
        mapping: the file they are mapped from; pages that a walk has touched are given back.
    """

    table: pa.Table
    mapping: mmap.mmap | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the columns."""
        return self.table.nbytes

    def line(self, row: int) -> bytes:
        """Write one row as JSON.

        Args:
            row: 0-based position in the file.

        Returns:
            One compact JSON object; a row that cannot be one (invalid UTF-8) is written with escapes of its bytes.
        """
        value, _ = _convert(self.table.slice(row, 1))[0]
        return to_line(value)

    def at(self, row: int) -> Parsed:
        """Convert one row.

        Args:
            row: 0-based position in the file.

        Returns:
            Its columns, or why there are none.
        """
        return _judged(*_convert(self.table.slice(row, 1))[0])

    def parsed(self) -> Iterator[Parsed]:
        """Convert the table in batches and give its rows in order."""
        for start in range(0, self.table.num_rows, BATCH_ROWS):
            for value, problem in _convert(self.table.slice(start, BATCH_ROWS)):
                yield _judged(value, problem)
            self.release()

    def release(self) -> None:
        """Give back the memory of mapped pages; they are read again when they are touched."""
        if self.mapping is not None:
            self.mapping.madvise(mmap.MADV_DONTNEED)


def _judged(value: dict[str, Any], problem: str) -> Parsed:
    if not problem and too_deep(value):
        problem = f"the row is nested deeper than {MAX_DEPTH} levels"
    return Parsed(problem=problem) if problem else Parsed(value)


def _convert(table: pa.Table) -> list[tuple[dict[str, Any], str]]:
    """Convert a few rows to Python values and a problem each."""
    problems = [""] * table.num_rows
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        columns[name] = _column(column, name, problems)
    return [({name: values[i] for name, values in columns.items()}, problems[i]) for i in range(table.num_rows)]


def _column(column: pa.ChunkedArray, name: str, problems: list[str]) -> list[Any]:
    if _is_plain(column.type):
        try:
            return column.to_pylist()
        except UnicodeDecodeError:  # one bad string spoils the batch: find its row the slow way
            pass
    values = []
    for i, scalar in enumerate(column):
        found: list[str] = []
        values.append(_plain(scalar, found))
        if found and not problems[i]:
            problems[i] = f"column {name[:40]!r}: {found[0]}"
    return values


def _is_plain(kind: pa.DataType) -> bool:
    """Say whether ``to_pylist`` alone gives JSON values of this type."""
    import pyarrow.types as pt

    if pt.is_struct(kind):
        return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    tests = (pt.is_null, pt.is_boolean, pt.is_integer, pt.is_floating, pt.is_string, pt.is_large_string)
    return any(test(kind) for test in tests)


def _plain(scalar: Any, problems: list[str]) -> Any:
    """Convert one Arrow scalar to a JSON value by the rules of this module; problems are added to the list."""
    import pyarrow as pa
    import pyarrow.types as pt

    kind = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.json":
            return _decode_json(scalar, problems)
        return _plain(scalar.value, problems)
    if pt.is_struct(kind):
        return {kind.field(i).name: _plain(scalar[i], problems) for i in range(kind.num_fields)}
    if pt.is_map(kind):
        return [[_plain(entry[0], problems), _plain(entry[1], problems)] for entry in scalar.values or ()]
    if pt.is_nested(kind) and not pt.is_union(kind):
        return [_plain(item, problems) for item in scalar.values or ()]
    if pt.is_dictionary(kind) or pt.is_union(kind):
        return _plain(scalar.value, problems)
    if pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind) or pt.is_binary_view(kind):
        return base64.b64encode(scalar.as_py()).decode("ascii")
    if pt.is_temporal(kind):
        return _temporal(scalar)
    return _simple(scalar, problems)


def _decode_json(scalar: Any, problems: list[str]) -> Any:
    text = _plain(scalar.value, problems)
    # The strict parser takes objects alone, so the value is wrapped in one.
    parsed = parse_line(b'{"value":' + text.encode("utf-8", "surrogateescape") + b"}")
    if parsed.value is None or set(parsed.value) != {"value"}:
        problems.append(f"its JSON cannot be read ({parsed.problem or 'it is more than one value'})")
        return text
    return parsed.value["value"]


def _simple(scalar: Any, problems: list[str]) -> Any:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        problems.append("a string is not UTF-8")
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _temporal(scalar: Any) -> str:
    import pyarrow.types as pt

    kind = scalar.type
    if pt.is_interval(kind):
        return str(tuple(scalar.as_py()))
    unit = {"date32[day]": "day", "date64[ms]": "ms"}.get(str(kind)) or kind.unit
    if unit == "day":
        return _iso(scalar.value * 86400, "", "date", "")
    seconds, rest = divmod(scalar.value, UNITS[unit])
    digits = f".{rest:0{len(str(UNITS[unit])) - 1}d}" if unit != "s" else ""
    if pt.is_duration(kind):
        whole, left = divmod(abs(scalar.value), UNITS[unit])
        part = f".{left:0{len(digits) - 1}d}" if digits else ""
        return f"{'-' if scalar.value < 0 else ''}PT{whole}{part}S"
    if pt.is_time(kind):
        return _iso(seconds, digits, "time", "")
    if pt.is_date(kind):
        return _iso(seconds, "", "date", "")
    return _iso(seconds, digits, "timestamp", "Z" if kind.tz else "")


def _iso(seconds: int, digits: str, what: str, zone: str) -> str:
    try:
        moment = datetime(1970, 1, 1) + timedelta(seconds=seconds)
    except OverflowError:  # outside the years 1 to 9999, which ISO 8601 needs an agreement for
        return f"{seconds}{digits} s since 1970-01-01{zone}"
    if what == "date":
        return moment.date().isoformat()
    if what == "time":
        return moment.time().isoformat() + digits
    return moment.isoformat() + digits + zone


def read_table_file(path: Path, kind: Kind) -> Opened:
    """Read a Parquet file, an Arrow file or stream, or a ``save_to_disk`` folder.

    Args:
        path: the file or folder.
        kind: parquet or arrow.

    Returns:
        Its rows as a table; Arrow files are memory-mapped.

    Raises:
        DataError: the file is not what its name says, or two columns have one name.
    """
    import pyarrow as pa

    parts = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
    try:
        load = _load_folder if path.is_dir() else _load_parquet if kind == "parquet" else _load_arrow
        rows = load(path)
        digest = digest_files(parts)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the {kind} file cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300],
            expected=f"a complete {kind} file",
            do="write or download the file again",
        ) from None
    _refuse_repeated(rows.table, str(path))
    return Opened(kind, digest, rows)


def _load_parquet(path: Path) -> TableRows:
    """Decode a small file; write a large one out as an Arrow stream, batch by batch, and map that."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # ParquetFile, not read_table: the latter invents columns out of folder names such as year=2020.
    with pq.ParquetFile(path, buffer_size=BLOCK) as file:
        if sum(file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups)) <= spool.IN_MEMORY:
            return TableRows(file.read())
        body = spool.nameless_file()
        sink = os.fdopen(os.dup(body.descriptor), "wb")
        with disk_errors(path), sink, pa.ipc.new_stream(sink, file.schema_arrow) as writer:
            for batch in file.iter_batches(SPOOL_ROWS, use_threads=False):
                writer.write_batch(batch)
    return _mapped(body.descriptor)


def _load_arrow(path: Path) -> TableRows:
    with path.open("rb") as file:
        return _mapped(file.fileno())


def _mapped(descriptor: int) -> TableRows:
    """Map an Arrow file or stream; the mapping outlives the descriptor."""
    import pyarrow as pa

    mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    source = pa.BufferReader(pa.py_buffer(mapping))
    is_file = mapping[:6] == b"ARROW1"
    table = pa.ipc.open_file(source).read_all() if is_file else pa.ipc.open_stream(source).read_all()
    return TableRows(table, mapping)


def _load_folder(path: Path) -> TableRows:
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise DataError(
            "the folder holds several splits",
            where=str(path),
            got=splits,
            expected="one split",
            do=f"pass one of its folders, such as {path / splits.split(', ')[0]}",
        )
    return TableRows(datasets.load_from_disk(str(path)).with_format("arrow")[:])


def _refuse_repeated(table: pa.Table, where: str) -> None:
    if repeated := _repeated_name(table.schema):
        raise DataError(
            "two columns have the same name", where=where, got=repr(repeated), do="rename or drop one of them"
        )


def _repeated_name(fields: Any) -> str | None:
    """Find a repeated field name in a schema or struct, at any depth."""
    import pyarrow.types as pt

    names = [one.name for one in fields]
    for i, one in enumerate(fields):
        if one.name in names[:i]:
            return one.name
        kind = one.type
        while pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
            kind = kind.value_type
        if pt.is_struct(kind) and (found := _repeated_name([kind.field(j) for j in range(kind.num_fields)])):
            return found
    return None


def digest_files(paths: list[Path]) -> str:
    """Hash the bytes of files one after the other.

    Args:
        paths: the files, in order.

    Returns:
        sha256 hex digest.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
