"""What a power loss may leave: a record of a run's system calls, and every disk that they allow (a model, ours).

Kept for certain are a file's bytes at its last fsync and a folder's names at its last fsync. Whatever came later may be
there or not: of a file's newer bytes all, a part, or zeros of the right length; of a folder's newer names any subset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

LOCK = "lock"  # the lock file holds nothing that a power loss could take


@dataclass(frozen=True)
class Op:
    """One call: what was done, to which file or folder, by which name."""

    kind: str  # create, write, truncate, sync, syncdir, link, unlink, rename, mkdir, note
    inode: int = -1
    folder: str = ""
    name: str = ""
    data: bytes = b""
    other: tuple[str, str] = ("", "")


@dataclass
class Trace:
    """The calls of a run under ``root``, in order; ``note`` marks what the client was told."""

    root: Path
    ops: list[Op] = field(default_factory=list)
    _inodes: dict[str, int] = field(default_factory=dict)
    _handles: dict[int, tuple[str, int]] = field(default_factory=dict)
    _count: int = 0

    def note(self, text: str) -> None:
        """Mark a moment."""
        self.ops.append(Op("note", name=text))

    def _inside(self, path: object) -> str | None:
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        root = str(self.root)
        return text[len(root) :].strip("/") if text == root or text.startswith(f"{root}/") else None

    def _new(self, name: str) -> int:
        self._count += 1
        self._inodes[name] = self._count
        return self._count

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls that this process makes below the root."""
        real = {name: getattr(os, name) for name in CALLS}
        with ExitStack() as stack:
            for name in CALLS:
                stack.enter_context(patch.object(os, name, getattr(self, f"_{name}")(real[name])))
            yield

    def _open(self, real: Callable) -> Callable:
        def call(path, flags, *more, **options):
            handle = real(path, flags, *more, **options)
            name = self._inside(path)
            if name is not None and Path(name).name != LOCK:
                if flags & os.O_CREAT and name not in self._inodes:
                    self.ops.append(Op("create", self._new(name), *_split(name)))
                self._handles[handle] = (name, self._inodes.get(name, -1))
            else:
                self._handles.pop(handle, None)
            return handle

        return call

    def _write(self, real: Callable) -> Callable:
        def call(handle, data):
            count = real(handle, data)
            if handle in self._handles:
                self.ops.append(Op("write", self._handles[handle][1], data=bytes(data)[:count]))
            return count

        return call

    def _fsync(self, real: Callable) -> Callable:
        def call(handle):
            real(handle)
            if handle in self._handles:
                name, inode = self._handles[handle]
                self.ops.append(Op("sync", inode) if inode >= 0 else Op("syncdir", folder=name))

        return call

    def _replace(self, real: Callable) -> Callable:
        def call(source, target):
            real(source, target)
            old, new = self._inside(source), self._inside(target)
            assert old is not None
            assert new is not None
            self._inodes[new] = self._inodes.pop(old)
            self.ops.append(Op("rename", self._inodes[new], *_split(new), other=_split(old)))

        return call

    def _link(self, real: Callable) -> Callable:
        def call(source, target):
            real(source, target)
            old, new = self._inside(source), self._inside(target)
            assert old is not None
            assert new is not None
            self._inodes[new] = self._inodes[old]
            self.ops.append(Op("link", self._inodes[new], *_split(new)))

        return call

    def _unlink(self, real: Callable) -> Callable:
        def call(path, *more, **options):
            real(path, *more, **options)
            name = self._inside(path)
            if name is not None:
                self.ops.append(Op("unlink", self._inodes.pop(name, -1), *_split(name)))

        return call

    def _mkdir(self, real: Callable) -> Callable:
        def call(path, *more, **options):
            real(path, *more, **options)
            name = self._inside(path)
            if name:
                self.ops.append(Op("mkdir", -1, *_split(name)))

        return call


CALLS = ("open", "write", "fsync", "replace", "link", "unlink", "mkdir")


def _split(name: str) -> tuple[str, str]:
    folder, _, last = name.rpartition("/")
    return folder, last


def rebuild(ops: list[Op], place: Path, choose: Callable[[int], int]) -> None:
    """Make one disk that a power loss after these calls may leave.

    Args:
        ops: the calls before the loss.
        place: an empty folder; the root of the run.
        choose: n -> a whole number in 0..n-1, drawn by whoever explores.
    """
    bytes_now: dict[int, bytes] = {}
    bytes_safe: dict[int, bytes] = {}
    safe: dict[str, dict[str, int]] = {"": {}}  # folder -> name -> inode, or -1 for a folder
    pending: dict[str, list[tuple[str, int | None]]] = {"": []}

    for op in ops:
        if op.kind == "create":
            bytes_now[op.inode], bytes_safe[op.inode] = b"", b""
        elif op.kind == "write":
            bytes_now[op.inode] += op.data
        elif op.kind == "sync":
            bytes_safe[op.inode] = bytes_now[op.inode]
        if op.kind in ("create", "link", "rename", "mkdir", "unlink"):
            pending.setdefault(op.folder, []).append((op.name, None if op.kind == "unlink" else op.inode))
        if op.kind == "rename":  # within one folder the two are one step, as rename promises
            assert op.other[0] == op.folder
            pending[op.folder][-1] = (f"{op.other[1]}\0{op.name}", op.inode)
        if op.kind == "syncdir":
            names = safe.setdefault(op.folder, {})
            for change in pending.get(op.folder, []):
                _apply(names, change)
            pending[op.folder] = []
    for folder in {*safe, *pending}:
        names = safe.setdefault(folder, {})
        for change in pending.get(folder, []):
            if choose(2):
                _apply(names, change)
    _lay_out(place, "", safe, {inode: _content(bytes_safe[inode], bytes_now[inode], choose) for inode in bytes_now})


def _apply(names: dict[str, int], change: tuple[str, int | None]) -> None:
    name, inode = change
    if inode is None:
        names.pop(name, None)
        return
    source, _, target = name.rpartition("\0")
    if source:
        names.pop(source, None)
    names[target] = inode


def _content(safe: bytes, now: bytes, choose: Callable[[int], int]) -> bytes:
    if safe == now:
        return now
    newer = len(now) - len(safe)
    kind = choose(4)
    if kind == 0:
        return safe
    if kind == 1:
        return now
    if kind == 2:
        return now[: len(safe) + choose(newer + 1)]
    return safe + bytes(newer)


def _lay_out(place: Path, folder: str, safe: dict[str, dict[str, int]], contents: dict[int, bytes]) -> None:
    """Write what can be reached from the root."""
    for name, inode in safe.get(folder, {}).items():
        path = place / name
        if inode >= 0:
            path.write_bytes(contents[inode])
        else:
            path.mkdir(mode=0o700)
            _lay_out(path, f"{folder}/{name}".strip("/"), safe, contents)
