"""The state of a training as one sealed file, and the one before it: damage to the last save costs what came after it (ours)."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gradsift.errors import StoreError
from gradsift.manifest import make_folder, write_bytes_atomic, write_error

SEAL = "seal/sha256"
BEFORE = ".before"
# A flipped bit may also say that a member is encrypted (RuntimeError) or packed in a way that zipfile does not know (one of these).
UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


def save_state(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep a state, whole or not at all; the one that was there is kept beside it.

    Args:
        path: an ``.npz`` file.
        arrays: names and arrays of numbers.

    Raises:
        StoreError: the disk reports an error (DiskFullError when it is full).
    """
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **{SEAL: _seal(arrays)})  # pyright: ignore[reportArgumentType]
    make_folder(path.parent)
    if path.is_file():
        try:
            path.replace(_before(path))
        except OSError as error:
            raise write_error(error, path, 0) from error
    write_bytes_atomic(path, buffer.getvalue())


def load_state(path: Path) -> tuple[dict[str, np.ndarray] | None, str]:
    """Read the newest state whose bytes are what was written.

    Args:
        path: as for :func:`save_state`.

    Returns:
        Its arrays, or None where none is whole; what was passed over and why, empty when nothing was.
    """
    remarks = []
    for place in (path, _before(path)):
        if not place.is_file():
            continue
        try:
            return _read(place), "; ".join(remarks)
        except StoreError as error:
            remarks.append(f"{place.name} is damaged ({error.got}) and is not used")
    return None, "; ".join(remarks)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
            arrays = {key: kept[key] for key in kept.files}
    except UNREADABLE as error:
        raise StoreError("a kept state cannot be read", where=str(path), got=type(error).__name__) from error
    seal = arrays.pop(SEAL, None)  # states of older versions have none, and rely on the archive's own checksums
    if seal is not None and not np.array_equal(seal, _seal(arrays)):
        raise StoreError(
            "a kept state is not what was written", where=str(path), got="bytes that do not match their seal"
        )
    return arrays


def _before(path: Path) -> Path:
    return path.with_name(f"{path.stem}{BEFORE}{path.suffix}")


def _seal(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)
