"""The ids of many rows with 36 bytes of memory each: a 128-bit hash, a number and two places (ours).

A generated id is the hash of the row's line in hexadecimal digits, with ``-2``, ``-3`` and so on for later copies, so its
text is made when it is asked for. Given ids are hashed likewise and their texts spooled. Copies and repeated ids are
neighbors once the hashes are sorted; no table of strings is kept.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped

from gradsift.data.spool import Spool, Spooled

SIZE = 16
_GENERATED = re.compile(r"([0-9a-f]{32})(?:-([1-9][0-9]*))?")
_HEX = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), dtype=np.uint8).reshape(256, 2)
_ASKED = 1 << 16  # ids that are looked up at a time: each takes some hundred bytes meanwhile
_PREFIX = 24  # bytes of an id that are sorted as numbers are; rows that agree in them are sorted by their texts


class Ids(Mapping[str, int]):
    """Id -> position. Made by :class:`IdsBuilder`; ids are unique.

    Args:
        digests: S16 [N] hashes.
        numbers: int32 [N], the how-manieth copy a generated id names, from 1; minus the place of its text for a given id.
        texts: the given ids.
        order: int64 [N] positions by hash, equal hashes by position.
    """

    def __init__(
        self,
        digests: Shaped[np.ndarray, " N"],
        numbers: Int32[np.ndarray, " N"],
        texts: Spooled,
        order: Int64[np.ndarray, " N"],
    ) -> None:
        self._digests, self._numbers, self._texts, self._order = digests, numbers, texts, order

    def __len__(self) -> int:
        return len(self._digests)

    def at(self, i: int) -> str:
        """Give the id at a position.

        Args:
            i: position, 0 to N - 1.

        Returns:
            The id.
        """
        number = int(self._numbers[i])
        if number <= 0:
            return self._texts[-number].decode("utf-8")
        name = _bytes(self._digests[i]).hex()
        return name if number == 1 else f"{name}-{number}"

    def __iter__(self) -> Iterator[str]:
        """Give all ids by position."""
        return self.names(0)

    def names(self, start: int) -> Iterator[str]:
        """Give the ids from a position on.

        Args:
            start: of the first.

        Returns:
            The ids.
        """
        return map(self.at, range(start, len(self)))

    def __getitem__(self, name: str) -> int:
        found = int(self.find([name])[0])
        if found < 0:
            raise KeyError(name)
        return found

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find([name])[0] >= 0

    def find(self, names: Sequence[str]) -> Int64[np.ndarray, " n"]:
        """Look ids up.

        Args:
            names: n texts.

        Returns:
            int64 [n] positions, -1 for those that are no id of a row.
        """
        parts = [self._find(names[start : start + _ASKED]) for start in range(0, len(names), _ASKED)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _find(self, names: Sequence[str]) -> Int64[np.ndarray, " n"]:
        found = np.full(len(names), -1, dtype=np.int64)
        if not len(self):
            return found
        given = [given_digest(name) for name in names]
        self._settle(found, names, range(len(names)), given, [0] * len(names))
        split = [(k, match) for k, name in enumerate(names) if (match := _GENERATED.fullmatch(name))]
        digests = [bytes.fromhex(match[1]) for _, match in split]
        self._settle(found, names, [k for k, _ in split], digests, [int(match[2] or 1) - 1 for _, match in split])
        return found

    def _settle(
        self,
        found: Int64[np.ndarray, " n"],
        names: Sequence[str],
        which: Sequence[int],
        digests: Sequence[bytes],
        later: Sequence[int],
    ) -> None:
        """Note the positions of the ids whose hash is at hand and whose text agrees."""
        keys = np.array([*digests, b"\0"], dtype=f"S{SIZE}")[:-1]
        low = np.searchsorted(self._digests, keys, sorter=self._order)
        for k, start, more in zip(which, low.tolist(), later, strict=True):
            if found[k] < 0 and start + more < len(self._order):
                position = int(self._order[start + more])
                if self.at(position) == names[k]:
                    found[k] = position

    @cached_property
    def rank(self) -> Int64[np.ndarray, " N"]:
        """int64 [N] place of each row when the ids are sorted as texts."""
        order = self._by_text()
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        return rank

    def _by_text(self) -> Int64[np.ndarray, " N"]:
        """Sort by the first bytes, then what agrees in them by the whole text; UTF-8 sorts as its code points do."""
        prefix = np.zeros((len(self), _PREFIX), dtype=np.uint8)
        digests = self._digests.view(np.uint8).reshape(-1, SIZE)
        made = np.flatnonzero(self._numbers > 0)
        prefix[made] = _HEX[digests[made, : _PREFIX // 2]].reshape(len(made), _PREFIX)
        shared = self._shared() if not len(made) else 0
        for position, text in zip(np.flatnonzero(self._numbers <= 0).tolist(), self._texts, strict=True):
            some = text[shared : shared + _PREFIX]
            prefix[position, : len(some)] = np.frombuffer(some, dtype=np.uint8)
        keys = prefix.reshape(-1).view(f"S{_PREFIX}") if len(self) else np.zeros(0, dtype=f"S{_PREFIX}")
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]])) if len(self) else np.zeros(1)
        for at in np.flatnonzero(np.diff(begins) > 1):
            some = order[int(begins[at]) : int(begins[at + 1])]
            some[:] = sorted(some.tolist(), key=self.at)
        return order

    def _shared(self) -> int:
        """Bytes that all given ids begin with."""
        least = most = None
        for text in self._texts:
            least = text if least is None or text < least else least
            most = text if most is None or text > most else most
        pairs = zip(least or b"", most or b"", strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(least or b""), len(most or b"")))


@dataclass(frozen=True)
class Clash:
    """Two rows with one id.

    Args:
        row: position of the row that is refused.
        other: position of the row that has the id.
        given: whether both ids were given; otherwise one equals a generated one.
    """

    row: int
    other: int
    given: bool


class IdsBuilder:
    """Collects the ids of rows in the order of their positions."""

    def __init__(self) -> None:
        self._digests, self._given = bytearray(), bytearray()
        self._texts, self._suspects = Spool(), array("q")

    def add_given(self, name: str) -> None:
        """Add a row with an id of its own.

        Args:
            name: the id.
        """
        if _GENERATED.fullmatch(name):
            self._suspects.append(len(self._given))
        self._digests += given_digest(name)
        self._given.append(1)
        self._texts.append(name.encode("utf-8"))

    def add_line(self, line: bytes) -> None:
        """Add a row whose id is a hash of its line.

        Args:
            line: the row as it is written out.
        """
        self._digests += hashlib.blake2b(line, digest_size=SIZE).digest()
        self._given.append(0)

    def seal(self, readable: Bool[np.ndarray, " N"]) -> tuple[Ids, Int64[np.ndarray, " N"], Clash | None]:
        """Name the copies and look for ids that stand twice.

        Args:
            readable: bool [N] whether a row's line is its own: a stand-in must not count as the first of a readable row.

        Returns:
            The ids; int64 [N] position of the first exact copy, -1 for rows that are no later copy; the first clash.
        """
        digests = np.frombuffer(bytes(self._digests), dtype=f"S{SIZE}")
        given = np.frombuffer(bytes(self._given), dtype=np.bool_)
        self._digests.clear()
        order = np.argsort(digests, kind="stable")
        ordinal, _ = _groups(digests, order)
        numbers = np.empty(len(digests), dtype=np.int32)
        numbers[order] = ordinal + 1
        numbers[given] = -np.arange(int(given.sum()), dtype=np.int32)
        first = np.full(len(digests), -1, dtype=np.int64)
        for kind in (True, False):
            some = order[(readable == kind)[order] & ~given[order]]
            place, begin = _groups(digests, some)
            first[some] = np.where(place > 0, begin, -1)
        ids = Ids(digests, numbers, self._texts.seal(), order)
        return ids, first, self._clash(ids, given, order, ordinal)

    def _clash(
        self, ids: Ids, given: Bool[np.ndarray, " N"], order: Int64[np.ndarray, " N"], ordinal: Int64[np.ndarray, " N"]
    ) -> Clash | None:
        again = order[(ordinal > 0) & given[order]]
        if again.size:
            row = int(again.min())
            at = int(np.flatnonzero(order == row)[0])
            return Clash(row, int(order[at - ordinal[at]]), True)
        found = []
        for position in self._suspects:
            name = ids.at(position)
            match = _GENERATED.fullmatch(name)
            assert match is not None
            digests, later = [bytes.fromhex(match[1])], [int(match[2] or 1) - 1]
            twin = np.full(1, -1, dtype=np.int64)
            ids._settle(twin, [name], [0], digests, later)
            if twin[0] >= 0:
                found.append(Clash(int(twin[0]), position, False))
        return min(found, key=lambda clash: clash.row, default=None)


def _groups(
    digests: Shaped[np.ndarray, " N"], order: Int64[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """For rows sorted by hash: the how-manieth of its hash each one is, from 0, and the position of the first of them."""
    if not order.size:
        return order, order
    keys, places = digests[order], np.arange(len(order))
    begins = np.concatenate([[True], keys[1:] != keys[:-1]])
    start = np.maximum.accumulate(np.where(begins, places, 0))
    return places - start, order[start]


def given_digest(name: str) -> bytes:
    """Hash a given id; never equal to the hash of a line that reads like it.

    Args:
        name: the id.

    Returns:
        16 bytes.
    """
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=SIZE, person=b"given id").digest()


def _bytes(digest: bytes) -> bytes:
    return bytes(digest).ljust(SIZE, b"\0")  # numpy takes zeros off the end
