"""One row as a JSON line: strict parsing, writing, and what every kind of file gives (``RawRows``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from gradsift.data.spool import Spooled

Kind = Literal["jsonl", "json", "csv", "parquet", "arrow", "hub"]
MAX_DEPTH = 128
_JSON_NAMES = {str: "string", list: "list", bool: "boolean", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Parsed:
    """One row's columns, or why there are none.

    Args:
        value: the row's columns; None when there is a problem or the row is blank.
        problem: a sentence for a malformed row.
        blank: the line holds nothing but whitespace.
        line: the row's JSON line where it is at hand; None where it would have to be written.
    """

    value: dict[str, Any] | None = None
    problem: str = ""
    blank: bool = False
    line: bytes | None = None


class RawRows(Protocol):
    """The rows of one file; those of a large one are read again whenever they are asked for."""

    def __len__(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """About how many bytes the rows take."""
        ...

    def at(self, row: int) -> Parsed:
        """Parse one row.

        Args:
            row: 0-based position in the file.

        Returns:
            What ``parsed`` gives at this place.
        """
        ...

    def line(self, row: int) -> bytes:
        """Return the JSON line of a row, without a newline.

        Args:
            row: 0-based position in the file.

        Returns:
            The input bytes of a JSON Lines row, otherwise one JSON object.
        """
        ...

    def parsed(self) -> Iterator[Parsed]:
        """Yield every row in order."""
        ...


@dataclass(frozen=True)
class Lines:
    """Rows kept as the bytes of their JSON line; on the disk where they are many.

    Args:
        lines: N lines without newline.
        problems: reasons for rows that failed before they had a line, by position.
    """

    lines: Spooled
    problems: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def num_bytes(self) -> int:
        """Bytes of all lines."""
        return self.lines.num_bytes

    def at(self, row: int) -> Parsed:
        """Parse one line.

        Args:
            row: 0-based position in the file.

        Returns:
            Its columns, or why there are none.
        """
        problem, line = self.problems.get(row), self.lines[row]
        return Parsed(problem=problem, line=line) if problem else parse_line(line)

    def line(self, row: int) -> bytes:
        """Return the bytes of a row.

        Args:
            row: 0-based position in the file.

        Returns:
            The line.
        """
        return self.lines[row]

    def parsed(self) -> Iterator[Parsed]:
        """Parse every line, in order."""
        return map(self.at, range(len(self.lines)))


@dataclass(frozen=True)
class Opened:
    """A file that was read.

    Args:
        kind: how it was read.
        sha256: hex digest of the file's bytes.
        rows: its rows.
        revision: commit of a hub data set, otherwise empty.
    """

    kind: Kind
    sha256: str
    rows: RawRows
    revision: str = ""


class _RepeatedKey(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for i, key in enumerate(keys) if key in keys[:i]))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def parse_line(line: bytes) -> Parsed:
    """Parse one JSON line strictly, and keep it beside its columns.

    Repeated keys at any depth, NUL bytes, invalid UTF-8, numbers too long to read and nesting beyond ``MAX_DEPTH`` are
    problems. NaN and Infinity are read; whether they may stay depends on the column.

    Args:
        line: bytes without the newline; a trailing carriage return is whitespace.

    Returns:
        The columns, a problem, or blank.
    """
    return replace(_parse(line), line=line)


def _parse(line: bytes) -> Parsed:
    if b"\0" in line:
        return Parsed(problem="the line holds a NUL byte")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Parsed(problem=f"the line is not UTF-8 at byte {error.start}")
    if not text.strip():
        return Parsed(blank=True)
    try:
        value = _DECODER.decode(text)
    except _RepeatedKey as error:
        return Parsed(problem=f"the key {str(error)[:40]!r} stands twice in one object")
    except json.JSONDecodeError as error:
        return Parsed(problem=f"the line is not JSON: {error.msg} at character {error.pos}")
    except ValueError:  # int() refuses literals of several thousand digits
        return Parsed(problem="a number has too many digits to be read")
    except RecursionError:
        return Parsed(problem=f"the row is nested deeper than {MAX_DEPTH} levels")
    if not isinstance(value, dict):
        return Parsed(problem=f"the row is a JSON {_JSON_NAMES.get(type(value), 'number')}, not an object")
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and too_deep(value):
        return Parsed(problem=f"the row is nested deeper than {MAX_DEPTH} levels")
    return Parsed(value)


def too_deep(value: Any) -> bool:
    """Say whether lists and objects are nested beyond ``MAX_DEPTH``, without recursion.

    Args:
        value: a parsed JSON value.

    Returns:
        True when some path has more than ``MAX_DEPTH`` containers.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def to_line(value: Any) -> bytes:
    """Write a value as one compact JSON line.

    Args:
        value: anything JSON can hold; NaN and infinities are written as Python's json writes them.

    Returns:
        UTF-8 bytes; a lone surrogate, which UTF-8 cannot hold, makes the whole line ASCII with escapes.
    """
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode("ascii")
