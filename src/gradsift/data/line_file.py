"""Rows of a JSON Lines file that stay in the file: eight bytes of memory per row, and a look at the file's date (ours)."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from gradsift.data.lines import Parsed, parse_line
from gradsift.data.spool import BLOCK, Handle
from gradsift.errors import DataError

_OPEN: OrderedDict[Path, Handle] = OrderedDict()  # files that were read last
_MAX_OPEN = 32


@dataclass(frozen=True)
class Stamp:
    """What tells a file from an edited one.

    Args:
        size: bytes.
        mtime_ns: when it was written last.
    """

    size: int
    mtime_ns: int


def stamp_of(descriptor: int) -> Stamp:
    """Look at an open file.

    Args:
        descriptor: of the file.

    Returns:
        Its stamp.
    """
    found = os.fstat(descriptor)
    return Stamp(found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class LineFile:
    """Lines of a file, read when they are asked for.

    Args:
        path: the file.
        starts: int64 [N] where each line begins; it ends where the next one begins.
        stamp: the file as it was when its hash was taken.
    """

    path: Path
    starts: Int64[np.ndarray, " N"] = field(repr=False)
    stamp: Stamp

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return self.stamp.size

    def line(self, row: int) -> bytes:
        """Read a line.

        Args:
            row: 0-based position in the file.

        Returns:
            Its bytes without the newline.

        Raises:
            DataError: the file has changed since its hash was taken, or cannot be read.
        """
        start = int(self.starts[row])
        end = int(self.starts[row + 1]) if row + 1 < len(self.starts) else self.stamp.size
        try:
            file = _opened(self.path, self.stamp)
            data = file.read(start, end - start)
            refuse_other(self.path, self.stamp, stamp_of(file.descriptor), None if len(data) == end - start else -1)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        return data.removesuffix(b"\n")

    def at(self, row: int) -> Parsed:
        """Read and parse a line.

        Args:
            row: 0-based position in the file.

        Returns:
            Its columns, or why there are none.
        """
        return parse_line(self.line(row))

    def parsed(self) -> Iterator[Parsed]:
        """Read the file in blocks and parse every line, in order."""
        if not len(self.starts):
            return
        try:
            with self.path.open("rb", buffering=BLOCK) as file:
                refuse_other(self.path, self.stamp, stamp_of(file.fileno()))
                file.seek(int(self.starts[0]))
                for count, line in enumerate(file):
                    if count == len(self.starts):  # it grew under our hands; the look below says so
                        break
                    yield parse_line(line.removesuffix(b"\n"))
                refuse_other(self.path, self.stamp, stamp_of(file.fileno()))
        except OSError as error:
            raise _unreadable(self.path, error) from None


def _opened(path: Path, stamp: Stamp) -> Handle:
    """Open a file, or take it from those that are open."""
    file = _OPEN.get(path)
    if file is None or stamp_of(file.descriptor) != stamp:  # another file may have taken its place since
        file = _OPEN[path] = Handle.open(path)
    _OPEN.move_to_end(path)
    if len(_OPEN) > _MAX_OPEN:
        _OPEN.popitem(last=False)
    return file


def refuse_other(path: Path, then: Stamp, now: Stamp, num_read: int | None = None) -> None:
    """Refuse a file that was written to between two looks at it.

    Args:
        path: the file.
        then: its first stamp.
        now: its second stamp.
        num_read: bytes that were read of all of it, where that is known.

    Raises:
        DataError: the stamps differ, or the bytes are not as many.
    """
    if then == now and num_read in (None, then.size):
        return
    raise DataError(
        "the file changed while it was read",
        where=str(path),
        got=f"{now.size} bytes now",
        expected=f"the {then.size} bytes that were there before, untouched",
        do="wait until whatever writes it is done, and run the same command again",
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        "the file can no longer be read", where=str(path), got=str(error), do="put it back and run the same command"
    )
