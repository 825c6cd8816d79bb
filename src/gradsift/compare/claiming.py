"""Several processes on one comparison: each cell is claimed by one of them, and a dead one's claim is recovered (ours).

A cell is claimed by creating its lock file with ``O_EXCL``; the note in it says who holds it, its time is the heartbeat.
Claims are taken and recovered under one kernel lock, so two processes that find the same dead claim cannot both take it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from gradsift.manifest import make_folder, write_error
from gradsift.store.lock import STALE_SECONDS, Holder, me

BEAT_SECONDS = 5.0


@contextlib.contextmanager
def claim(folder: Path, key: str) -> Iterator[bool]:
    """Claim a cell for this process and keep its heartbeat.

    Args:
        folder: of the comparison.
        key: from :func:`cell_key`.

    Yields:
        Whether the cell is ours to compute: False when it is finished or another living process has it.
    """
    lock = folder / "locks" / f"{key}.lock"
    make_folder(lock.parent)
    with guard(folder):
        ours = not (folder / "cells" / f"{key}.json").exists() and _take(lock)
    if not ours:
        yield False
        return
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, stop), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        stop.set()
        beat.join()
        lock.unlink(missing_ok=True)


def holder(folder: Path, key: str) -> Holder | None:
    """Tell who computes a cell at this moment, or None."""
    found = _note(folder / "locks" / f"{key}.lock")
    return found


def _take(lock: Path) -> bool:
    if lock.exists() and not _dead(lock):
        return False
    lock.unlink(missing_ok=True)
    try:
        handle = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False  # only where the kernel lock does not reach: another machine on a network disk
    except OSError as error:
        raise write_error(error, lock, 200) from error
    with os.fdopen(handle, "w", encoding="ascii") as file:
        json.dump(asdict(me()), file)
    return True


def _dead(lock: Path) -> bool:
    note = _note(lock)
    if note is not None and note.here:
        return not note.alive
    with contextlib.suppress(OSError):
        return abs(time.time() - lock.stat().st_mtime) > STALE_SECONDS
    return True


def _note(lock: Path) -> Holder | None:
    try:
        return Holder(**json.loads(lock.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _beat(lock: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a heartbeat informs; a missed one must not end the work
            os.utime(lock)


@contextlib.contextmanager
def guard(folder: Path) -> Iterator[None]:
    """Hold the folder's kernel lock for a moment.

    Args:
        folder: of the comparison.

    Yields:
        Nothing.
    """
    import fcntl

    make_folder(folder / "locks")
    handle = os.open(folder / "locks" / "guard", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
