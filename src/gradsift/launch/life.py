"""Signs of life by files: a counter that a thread moves on, and a watch that believes only what it saw move (ours).

No two clocks are compared: a process counts as gone when its counter did not move for a while on the watcher's own
clock, or at once where its process number is free again on the same machine. A process that hangs with a live thread
is not found out.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from gradsift.manifest import make_folder, write_error
from gradsift.store.lock import process_start

BEAT_SECONDS = 0.5


@dataclass(frozen=True)
class Note:
    """What a process says about itself.

    Args:
        name: unique name of the process in the run.
        rank: its rank.
        host: name of its machine.
        place: identity of kernel and process table, empty where the system gives none.
        pid: process number.
        process_start: start of the process in ticks since boot, 0 where unknown.
        count: moves on while the process lives.
        ended: whether it has said goodbye.
    """

    name: str
    rank: int
    host: str
    place: str
    pid: int
    process_start: int
    count: int = 0
    ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Heart:
    """A thread that moves this process's counter; use it in ``with``.

    Args:
        folder: of the signs of life; made when absent.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.note = about_me(f"{rank}-{os.getpid()}-{secrets.token_hex(4)}", rank)
        self.path = folder / f"{self.note.name}.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heart:
        make_folder(self.path.parent)
        try:
            self._write(0, False)
        except OSError as error:
            raise write_error(error, self.path, 0) from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._write(0, True)

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # a sign of life informs; a missed one must not end the work
                self._write(count, False)

    def _write(self, count: int, ended: bool) -> None:
        # By rename, so that no reader sees half a note; not fsynced, since it means nothing after a power loss.
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps({**asdict(self.note), "count": count, "ended": ended}), "utf-8")
        fresh.replace(self.path)


def read_note(path: Path) -> Note | None:
    """Read a sign of life.

    Args:
        path: its file.

    Returns:
        The note, or None when there is none or it cannot be read.
    """
    try:
        return Note(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class Watch:
    """Follows another process's sign of life.

    Args:
        path: its file.
        gone_seconds: without a move for so long it is gone.
        clock: seconds, for tests.
    """

    def __init__(self, path: Path, gone_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.gone_seconds, self._clock = path, gone_seconds, clock
        self.note = read_note(path)
        self.moved = False
        self._since = clock()

    def gone(self) -> bool:
        """Look again, and tell whether the process is gone."""
        new = read_note(self.path)
        if new is not None and self.note is not None and new != self.note:
            self.moved, self._since = True, self._clock()
        elif new is not None and self.note is None:
            self._since = self._clock()
        self.note = new or self.note
        if self.note is not None and (self.note.ended or is_dead(self.note)):
            return True
        return self._clock() - self._since > self.gone_seconds


def about_me(name: str, rank: int | None = None) -> Note:
    """Describe this process.

    Args:
        name: unique name of the process in the run.
        rank: its rank; None reads it from the name, ``RANK-PID-...``.

    Returns:
        The note.
    """
    pid = os.getpid()
    rank = int(name.partition("-")[0]) if rank is None else rank
    return Note(name, rank, socket.gethostname(), _place(), pid, process_start(pid))


def is_dead(note: Note) -> bool | None:
    """Ask the process table of this machine.

    Args:
        note: of a process.

    Returns:
        Whether the process has ended; None for a process of another machine or container.
    """
    if not note.place or note.place != _place() or not note.process_start:
        return None
    return process_start(note.pid) != note.process_start


def _place() -> str:
    """Name the kernel and the process table; two containers of one machine have different tables."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return ""
