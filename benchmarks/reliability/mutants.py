"""Defects of the store that several trials plant: each is a way in which such stores have been written."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from gradsift import manifest
from gradsift.manifest import TMP_SUFFIX, fsync_folder
from gradsift.store import staging, writer

RECORD_FIRST = "the commit record is written before its shard"
EARLY_ACK = "rows are acknowledged before they are committed"
NO_FSYNC_FILE = "files are not fsynced"
NO_FSYNC_FOLDER = "folders are not fsynced"
NO_FLUSH = "the bytes are flushed after the fsync"
RENAME_FIRST = "a file is renamed before its fsync"


@contextmanager
def record_first() -> Iterator[None]:
    """Write a shard's files only after its commit record."""
    late: list[tuple[Path, bytes]] = []
    publish = writer.write_bytes_atomic

    def record(path: Path, data: bytes) -> None:
        publish(path, data)
        if late:
            while late:
                manifest.write_file(*late.pop(0))
            fsync_folder(path.parent.parent / "shards")

    with ExitStack() as stack:
        stack.enter_context(patch.object(writer, "write_file", lambda path, data: late.append((path, data))))
        stack.enter_context(patch.object(writer, "write_bytes_atomic", record))
        yield


@contextmanager
def writing(plan: str) -> Iterator[None]:
    """Replace the function that writes a file; ``plan`` is NO_FSYNC_FILE, NO_FLUSH or RENAME_FIRST."""

    def write_file(path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}{TMP_SUFFIX}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        if plan == NO_FLUSH:
            kept = io.BytesIO(data)  # as in a file object's buffer
            os.fsync(handle)
            os.write(handle, kept.getvalue())
        else:
            os.write(handle, data)
        if plan == RENAME_FIRST:
            os.replace(temporary, path)  # noqa: PTH105
            os.fsync(handle)
        os.close(handle)
        if plan != RENAME_FIRST:
            os.replace(temporary, path)  # noqa: PTH105

    with ExitStack() as stack:
        for module in (manifest, writer, staging):
            stack.enter_context(patch.object(module, "write_file", write_file))
        yield


@contextmanager
def no_folder_fsync() -> Iterator[None]:
    """Leave folders alone."""
    with ExitStack() as stack:
        for module in (manifest, writer, staging):
            stack.enter_context(patch.object(module, "fsync_folder", lambda folder: None))
        yield


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant one of this module's defects of writing; an empty name plants none."""
    with ExitStack() as stack:
        if defect == RECORD_FIRST:
            stack.enter_context(record_first())
        elif defect == NO_FSYNC_FOLDER:
            stack.enter_context(no_folder_fsync())
        elif defect:
            stack.enter_context(writing(defect))
        yield
