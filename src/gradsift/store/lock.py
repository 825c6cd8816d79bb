"""One writer per store: a kernel lock that dies with its holder, and a note that says who that is (ours).

Exclusion is ``flock`` on a file that is never deleted, so a killed writer leaves nothing to clean up and a reused process
number can fool nobody. The note (process, host, start time) names the holder to whoever is refused. Only where the note
comes from another running kernel, as on a network disk that may keep locks to each machine, does its heartbeat decide.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from gradsift.errors import StoreError
from gradsift.manifest import write_error

LOCK = "lock"
STALE_SECONDS = 60.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        pid: process number.
        host: name of the machine.
        boot: identity of the running kernel, empty where the system gives none.
        process_start: start of the process in clock ticks since boot, 0 where unknown; tells reused numbers apart.
        since: time the lock was taken, seconds since 1970.
    """

    pid: int
    host: str
    boot: str
    process_start: int
    since: float

    @property
    def here(self) -> bool:
        """Whether the holder runs, or ran, under this kernel."""
        boot = _boot()
        return self.boot == boot if boot else self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether that very process still runs here; a reused number does not count."""
        return process_start(self.pid) == self.process_start != 0


class Lock:
    """A held lock; release it or use it in ``with``.

    Args:
        path: the lock file.
        handle: its open file descriptor, which the kernel lock belongs to.
        recovered: note of a holder that had died, or None.
    """

    def __init__(self, path: Path, handle: int, recovered: Holder | None) -> None:
        self.path, self.recovered = path, recovered
        self._handle: int | None = handle
        # A forked child shares the kernel lock and would keep it alive after a kill of this process.
        os.register_at_fork(after_in_child=_weak(self))

    @property
    def held(self) -> bool:
        """Whether the lock is still held."""
        return self._handle is not None

    def beat(self) -> None:
        """Show that the holder is at work: set the lock file's time to now."""
        if self._handle is not None:
            with contextlib.suppress(OSError):  # a heartbeat informs; the kernel lock is what excludes
                os.utime(self._handle)

    def release(self) -> None:
        """Give the lock back and empty the note. Does nothing when already released."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
            os.close(handle)

    def forget(self) -> None:
        """Close the file without emptying the note: the lock stays with the process that took it."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _weak(lock: Lock) -> Callable[[], None]:
    reference = weakref.ref(lock)

    def forget() -> None:
        alive = reference()
        if alive is not None:
            alive.forget()

    return forget


def process_start(pid: int) -> int:
    """Tell when a process started.

    Args:
        pid: process number.

    Returns:
        Clock ticks since boot; 0 when there is no such process, when it has ended and only waits for its parent to
        notice, or when the system has no ``/proc``.
    """
    try:
        # The command name is in parentheses and may itself hold blanks and parentheses.
        words = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        return 0 if words[0] in "ZX" else int(words[19])
    except (OSError, ValueError, IndexError):
        return 0


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def me() -> Holder:
    """Describe this process.

    Returns:
        Its note.
    """
    pid = os.getpid()
    return Holder(pid, socket.gethostname(), _boot(), process_start(pid), time.time())


def take_lock(folder: Path) -> Lock:
    """Become the one writer of a store.

    Args:
        folder: the store's folder; exists.

    Returns:
        The held lock.

    Raises:
        StoreError: another writer holds it (it is named), or this disk cannot lock files.
    """
    import fcntl

    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise write_error(error, path, 0) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refused(path, _read_note(handle), handle) from None
        except OSError as error:
            raise StoreError(
                "this disk cannot lock files, so two writers could not be kept apart",
                where=str(path),
                got=error.strerror,
                do="use --out on a local disk",
            ) from error
        before = _read_note(handle)
        if before is not None and not before.here and _age(handle) < STALE_SECONDS:
            raise _refused(path, before, handle)
        _write_note(path, handle)
        return Lock(path, handle, before)
    except BaseException:
        os.close(handle)
        raise


def _read_note(handle: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(handle, 4096, 0)))
    except (ValueError, TypeError, RecursionError):
        return None  # empty after a clean release, or being written at this moment


def _write_note(path: Path, handle: int) -> None:
    note = json.dumps(asdict(me())).encode("ascii", "replace")
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, note, 0)
    except OSError as error:
        raise write_error(error, path, len(note)) from error


def _age(handle: int) -> float:
    return abs(time.time() - os.fstat(handle).st_mtime)


def _refused(path: Path, holder: Holder | None, handle: int) -> StoreError:
    if holder is None:
        got, do = "a process that has not yet written its name", "wait for it to end"
    else:
        got = f"process {holder.pid} on {holder.host}, at work {_age(handle):.0f} s ago"
        do = f"wait for it to end, or stop process {holder.pid}"
        if holder.here and holder.process_start and not holder.alive:
            got = f"a child of process {holder.pid} on {holder.host}, which itself has ended"
            do = f"end what process {holder.pid} started"
        elif not holder.here:
            do = f"wait for it to end; if it was killed, try again {STALE_SECONDS:.0f} s after its last sign of life"
    return StoreError("another writer holds this store", where=str(path), got=got, expected="one writer", do=do)
