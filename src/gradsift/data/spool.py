"""Many byte strings with eight bytes of memory each: what is large lies in a nameless file of the cache folder (ours).

Nothing is mapped: a string is read when it is asked for, so the memory held is that of the offsets.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from gradsift.data.cache import cache_folder, disk_errors

IN_MEMORY = 1 << 24  # bytes of one file's rows up to which they stay in memory
BLOCK = 1 << 20


class Spool:
    """Strings that are appended, then read back by their number.

    Args:
        limit: bytes up to which they stay in memory; None takes :data:`IN_MEMORY`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = IN_MEMORY if limit is None else limit
        self._buffer, self._flushed = bytearray(), 0
        self._file: Handle | None = None
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, data: bytes) -> None:
        """Add a string.

        Args:
            data: any bytes.

        Raises:
            DiskFullError: the cache folder has no space.
        """
        self._buffer += data
        self._ends.append(self._flushed + len(self._buffer))
        if self._file is None and len(self._buffer) > self._limit:
            self._file = nameless_file()
        if self._file is not None and len(self._buffer) > BLOCK:
            self._flush()

    def seal(self) -> Spooled:
        """End the writing.

        Returns:
            The strings; the spool itself must not be used again.
        """
        if self._file is not None:
            self._flush()
        ends = np.frombuffer(self._ends, dtype=np.int64) if self._ends else np.zeros(0, dtype=np.int64)
        return Spooled(bytes(self._buffer) if self._file is None else self._file, ends)

    def _flush(self) -> None:
        assert self._file is not None
        with disk_errors(cache_folder()):
            self._file.write(self._buffer)
        self._flushed += len(self._buffer)
        self._buffer.clear()


class Spooled:
    """Strings of a sealed spool.

    Args:
        body: all of them one after the other, or the file that holds them so.
        ends: int64 [N] where each one ends.
    """

    def __init__(self, body: bytes | Handle, ends: Int64[np.ndarray, " N"]) -> None:
        self._body, self._ends = body, ends

    @property
    def num_bytes(self) -> int:
        """Length of all strings together."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self._ends):
            raise IndexError(i)
        start, end = int(self._ends[i - 1]) if i else 0, int(self._ends[i])
        if isinstance(self._body, bytes):
            return self._body[start:end]
        return self._body.read(start, end - start)

    def __iter__(self) -> Iterator[bytes]:
        """Give all strings in order, read in blocks."""
        first = 0
        while first < len(self._ends):
            start = int(self._ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(self._ends, start + BLOCK, side="right")))
            if isinstance(self._body, bytes):
                block = self._body[start : int(self._ends[last - 1])]
            else:
                block = self._body.read(start, int(self._ends[last - 1]) - start)
            at = 0
            for end in (self._ends[first:last] - start).tolist():
                yield block[at:end]
                at = end
            first = last


class Remarks:
    """Sentences about some of many rows: nothing is held for the others.

    Args:
        rows: int64 [k] which rows, increasing.
        texts: k sentences.
    """

    def __init__(self, rows: Int64[np.ndarray, " k"], texts: Spooled) -> None:
        self._rows, self._texts = rows, texts

    def __getitem__(self, row: int) -> str:
        at = bisect_left(self._rows, row)
        found = at < len(self._rows) and self._rows[at] == row
        return self._texts[at].decode("utf-8", "surrogatepass") if found else ""


class Handle:
    """An open file that is closed when nobody holds it any more; reading does not move a position.

    Args:
        descriptor: of the open file; belongs to this object from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, path: Path) -> Handle:
        """Open a file for reading.

        Args:
            path: the file.

        Returns:
            The open file.
        """
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def write(self, data: bytes | bytearray) -> None:
        """Write all of some bytes at the end.

        Args:
            data: the bytes.
        """
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.write(self.descriptor, view[done:])

    def read(self, start: int, size: int) -> bytes:
        """Read from a place of the file, whatever others read.

        Args:
            start: offset in bytes.
            size: bytes.

        Returns:
            The bytes; fewer where the file ends.
        """
        parts, got = [], 0
        while got < size:
            part = os.pread(self.descriptor, size - got, start + got)
            if not part:
                break
            parts.append(part)
            got += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def nameless_file() -> Handle:
    """Make a file in the cache folder that no name leads to, so that it is gone when the process is.

    Returns:
        The file, open for writing and reading.

    Raises:
        DiskFullError: no space is left.
        ConfigError: the folder cannot be written.
    """
    folder = cache_folder() / "spool"
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)  # noqa: PTH108
    return Handle(descriptor)
