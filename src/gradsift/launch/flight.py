"""Rows that kill the process that measures them: notes of what is in flight, and which rows are to blame (ours).

A process writes down the rows of a micro-batch before it measures them and removes the note when it ends in good order,
so a note without a process is a death over these rows. Rows that were there at two deaths are tried alone first, which
names the one that kills. See docs/decisions/0009-rows-that-kill.md.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gradsift.errors import StoreError
from gradsift.launch.life import Note, about_me, is_dead
from gradsift.manifest import make_folder
from gradsift.store.shards import ShardResult, join_shards
from gradsift.types import TokenRow

FLIGHTS = "flights"
FALLEN = "fallen"
MAX_DEATHS = 3  # processes that a row may cost, the last one with this row alone


@dataclass(frozen=True)
class Fall:
    """What a process was measuring when it died.

    Args:
        process: who it was.
        rows: ids of the rows of the micro-batch.
    """

    process: str
    rows: frozenset[str]


class Flight:
    """This process's note of what it measures; it informs, so a disk that does not take it stops nothing.

    Args:
        folder: the store's folder.
        name: unique name of the process.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        self._folder, self._handle = folder / FLIGHTS, -1
        self.rename(name or f"0-{os.getpid()}-{secrets.token_hex(4)}")

    def rename(self, name: str) -> None:
        """Take the name by which the other processes know this one.

        Args:
            name: unique name of the process; the file is ``name.json``.
        """
        self._path = self._folder / f"{name}.json"
        self._who = asdict(about_me(name))

    def write(self, rows: Sequence[TokenRow]) -> None:
        """Say what is measured from now on.

        Args:
            rows: the rows of a micro-batch.
        """
        line = json.dumps({"who": self._who, "rows": [row.id for row in rows]}) + "\n"
        with contextlib.suppress(OSError, StoreError):
            if self._handle < 0:
                make_folder(self._folder)
                self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._handle, line.encode("ascii"), 0)  # readers take the first line; no fsync: it is no result

    def land(self) -> None:
        """Say that nothing is in flight."""
        with contextlib.suppress(OSError):
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def flying(flight: Flight) -> Iterator[None]:
    """Take the note back when the work ends in good order, an exception included.

    Args:
        flight: the note.

    Yields:
        None: nothing.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        flight.land()
        raise
    flight.land()


class Watchdog:
    """Ends this process when a micro-batch takes far too long; use it in ``with`` around the work.

    The interpreter's fault handler does it from a thread of its own, which also runs while native code holds the
    interpreter's lock, and prints where every thread stood. It has one clock per process.

    Args:
        seconds: longest time between two signs of work; 0 never ends the process.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._on = False

    def pet(self) -> None:
        """Show a sign of work."""
        if self._on and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def __enter__(self) -> Watchdog:
        self._on = self.seconds > 0
        self.pet()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._on = False
            faulthandler.cancel_dump_traceback_later()


def measure_unit(
    measure: Callable[[Sequence[TokenRow]], ShardResult], rows: Sequence[TokenRow], falls: Sequence[Fall]
) -> ShardResult:
    """Measure rows, carefully where processes have died over some of them.

    One death may have come from outside, so it changes nothing. Rows that were in flight at two deaths are tried alone
    first; when all survive, the rows are measured as ever, so that no bit differs. Rows that were in flight at a third
    one keep what they gave alone.

    Args:
        measure: rows -> their signals; writes the notes.
        rows: n rows.
        falls: deaths so far.

    Returns:
        The signals, in the order of the rows.
    """
    deaths = [num_deaths(row.id, falls) for row in rows]
    places = [k for k, count in enumerate(deaths) if count >= MAX_DEATHS - 1]
    tried = {k: measure([rows[k]]) for k in places}
    kept = [k for k in places if deaths[k] >= MAX_DEATHS]
    rest = [k for k in range(len(rows)) if k not in set(kept)]
    parts = [measure([rows[k] for k in rest])] if rest else []
    if not kept:
        return parts[0]
    joined = join_shards([*parts, *(tried[k] for k in kept)])
    where = {k: at for at, k in enumerate([*rest, *kept])}
    return joined.take(np.array([where[k] for k in range(len(rows))]))


def num_deaths(row: str, falls: Sequence[Fall]) -> int:
    """Count the processes that died while a row was in flight.

    Args:
        row: its id.
        falls: deaths so far.

    Returns:
        The count.
    """
    return sum(row in fall.rows for fall in falls)


def is_condemned(row: str, falls: Sequence[Fall]) -> bool:
    """Tell whether a row is not tried again: it was there at three deaths, at one of them alone.

    Args:
        row: its id.
        falls: deaths so far.

    Returns:
        True where its status is WORKER_CRASH.
    """
    return num_deaths(row, falls) >= MAX_DEATHS and any(fall.rows == {row} for fall in falls)


def why_condemned(row: str, falls: Sequence[Fall]) -> str:
    """Say why a row is not tried again.

    Args:
        row: its id.
        falls: deaths so far.

    Returns:
        A sentence.
    """
    single = sum(fall.rows == {row} for fall in falls)
    who = ", ".join(sorted({fall.process for fall in falls if row in fall.rows}))
    return (
        f"{num_deaths(row, falls)} processes died while they measured it, {single} of them with this row alone: {who}"
    )


def fallen(folder: Path) -> tuple[Fall, ...]:
    """Read the deaths that were found so far.

    Args:
        folder: the store's folder.

    Returns:
        One entry each; torn notes tell nothing and are left out.
    """
    found = []
    for path in _notes(folder / FLIGHTS / FALLEN):
        note = _read(path)
        if note is not None:
            found.append(Fall(str(note[0]), frozenset(note[1])))
    return tuple(found)


def gather(folder: Path, committed: AbstractSet[str]) -> tuple[Fall, ...]:
    """Take stock when a store is opened: a note whose process is gone is a death; those of committed rows are forgotten.

    Args:
        folder: the store's folder; its writer is this process.
        committed: ids of the rows that have their result.

    Returns:
        The deaths that matter.
    """
    for path in _notes(folder / FLIGHTS):
        note = _read(path)
        if note is None or note[0].pid == os.getpid() or is_dead(note[0]) is not False:
            fell(folder, path.stem)
    falls = tuple(fall for fall in fallen(folder) if not fall.rows <= committed)
    if not falls:
        forget(folder)
    return falls


def fell(folder: Path, name: str) -> bool:
    """Write down that a process is gone.

    Args:
        folder: the store's folder.
        name: unique name of the process.

    Returns:
        Whether it left a note of what it was measuring.
    """
    path = folder / FLIGHTS / f"{name}.json"
    if not path.exists():
        return False
    make_folder(folder / FLIGHTS / FALLEN)
    with contextlib.suppress(FileNotFoundError):
        path.replace(folder / FLIGHTS / FALLEN / path.name)
        return True
    return False


def forget(folder: Path) -> None:
    """Remove the deaths that were found: the rows they are about have their results.

    Args:
        folder: the store's folder.
    """
    shutil.rmtree(folder / FLIGHTS / FALLEN, ignore_errors=True)
    with contextlib.suppress(OSError):  # a note of a straggler stays
        (folder / FLIGHTS).rmdir()


def _read(path: Path) -> tuple[Note, list[str]] | None:
    try:
        note = json.loads(path.read_text("ascii").partition("\n")[0])
        return Note(**note["who"]), [str(row) for row in note["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _notes(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(".json"))  # noqa: PTH208
    except OSError:
        return []
