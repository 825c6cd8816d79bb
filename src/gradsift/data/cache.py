"""The cache folder: fetched wheels and converted models, every one published whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradsift.errors import ConfigError, DiskFullError

CHUNK = 1 << 22
KEEP_SECONDS = 30 * 86400


def cache_folder() -> Path:
    """Find the cache: ``$GRADSIFT_CACHE``, else ``$XDG_CACHE_HOME/gradsift``, else ``~/.cache/gradsift``.

    Returns:
        An existing folder, made readable by its owner alone when it is created here.

    Raises:
        ConfigError: the folder cannot be made.
    """
    given, base = os.environ.get("GRADSIFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(given).expanduser() if given else (Path(base) if base else Path.home() / ".cache") / "gradsift"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "the cache folder cannot be made",
            where=str(folder),
            got=error.strerror or str(error),
            expected="a folder that can be written",
            do="set GRADSIFT_CACHE to such a folder",
        ) from None
    return folder.absolute()


def sha256_file(path: Path) -> str:
    """Hash a file in chunks.

    Args:
        path: any file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def remove_old(folder: Path) -> None:
    """Remove what is more than 30 days old.

    Args:
        folder: whose files and folders are looked at; whoever wants to keep one renews its date.
    """
    for entry in folder.iterdir():
        if entry.stat().st_mtime >= time.time() - KEEP_SECONDS:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a folder without write permission into a refusal.

    Args:
        where: what was being written, for the message.

    Yields:
        None: nothing.

    Raises:
        DiskFullError: no space was left.
        ConfigError: the system did not let us write.
        OSError: any other error of the system, unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                "the disk is full",
                where=str(where),
                do="free space, or set GRADSIFT_CACHE to a folder with space, and run the same command",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(
                "the folder cannot be written",
                where=str(where),
                got=error.strerror,
                do="set GRADSIFT_CACHE to a folder that can be written",
            ) from None
        raise


@contextmanager
def published_folder(final: Path) -> Iterator[Path]:
    """Write a folder so that others see all of it or nothing.

    The caller fills the temporary folder beside ``final``; on leaving, its files are flushed to the disk and the folder
    is renamed. After an exception nothing is left. Hold a lock around it: two writers of one folder are refused.

    Args:
        final: the folder's place; must not exist yet.

    Yields:
        Path: an empty temporary folder on the same file system.
    """
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _flush(path)
        _flush(temporary)
        temporary.rename(final)
        _flush(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def published_file(final: Path) -> Iterator[Path]:
    """Write one file so that others see all of it or nothing; an older file of that name is replaced.

    Args:
        final: the file's place.

    Yields:
        Path: an empty temporary file beside it.
    """
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", dir=final.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(final)
        _flush(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Force a file or folder to the disk; folders cannot be opened on Windows and are skipped there."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
