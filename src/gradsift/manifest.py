"""What made an artifact, and how it gets onto the disk whole: canonical JSON, hashes, versions, atomic writes (ours).

A file is written under a temporary name, flushed, fsynced, renamed, and then its folder is fsynced: whoever sees the
name sees all of the bytes, after a kill and after a power loss. A failed fsync is never tried again on the same file:
the kernel may have marked its dirty pages clean (Rebello et al., USENIX ATC 2020), so the second call would lie.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import subprocess
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gradsift.errors import DataError, DiskFullError, StoreError

TMP_SUFFIX = ".tmp"
RECIPE, NEXT_RECIPE, MANIFEST = "recipe.yaml", "recipe.next.yaml", "manifest.json"  # of a run of select
PACKAGES = ("gradsift", "torch", "transformers", "numpy")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BLOCK = 1 << 20


def canonical_json(value: Any) -> str:
    """Write a value so that equal values give equal text: sorted keys, no spaces, plain ASCII.

    Args:
        value: nested mappings with string keys, sequences, strings, integers, finite floats, booleans, None.

    Returns:
        JSON text. Tuples read back as lists.

    Raises:
        TypeError: a key is no string, or a value has no JSON form.
        ValueError: a float is not finite.
    """
    _check_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check_keys(value: Any) -> None:
    # json.dumps turns the keys 1, True and None into strings, so two different mappings could share one text.
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a JSON key must be a string, got {key!r}")
            _check_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item)


def sha256_bytes(data: bytes) -> str:
    """Hash bytes.

    Args:
        data: any bytes.

    Returns:
        64 hex digits.
    """
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash a file's bytes, one mebibyte at a time.

    Args:
        path: an existing file.

    Returns:
        64 hex digits.

    Raises:
        StoreError: the disk reports an error while reading.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise read_error(error, path) from error
    return digest.hexdigest()


def hash_parts(parts: Iterable[bytes], *, digest_size: int = 16) -> str:
    """Hash a sequence of byte strings; every part is framed by its length, so ``ab, c`` differs from ``a, bc``.

    Args:
        parts: byte strings, in order.
        digest_size: bytes of the digest.

    Returns:
        blake2b, 2 * digest_size hex digits.
    """
    digest = hashlib.blake2b(digest_size=digest_size)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Tell which versions are installed, without importing any of them.

    Returns:
        ``python`` and every package of ``PACKAGES``; ``absent`` for those not installed.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def git_sha(folder: Path) -> str | None:
    """Tell the commit that a folder is checked out at.

    Args:
        folder: a folder inside a git work tree.

    Returns:
        40 hex digits; outside a work tree or without git those of the variable ``GRADSIFT_COMMIT``, which whoever builds an
        image can set; else None.
    """
    command = ["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"]
    given = os.environ.get("GRADSIFT_COMMIT", "")
    otherwise = given if re.fullmatch(r"[0-9a-f]{40}", given) else None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return otherwise
    return (done.stdout.strip() or otherwise) if done.returncode == 0 else otherwise


def write_error(error: OSError, path: Path, num_bytes: int) -> StoreError:
    """Turn an operating-system error of a write, fsync or rename into ours.

    Args:
        error: what the system reported.
        path: the file that was being written.
        num_bytes: bytes the file needs, 0 for a folder.

    Returns:
        A DiskFullError for a full disk or quota, otherwise a StoreError.
    """
    needs = f"{num_bytes} bytes for this file" if num_bytes else "a few bytes for one more name in this folder"
    if error.errno in _FULL:
        return DiskFullError(
            "the disk is full",
            where=str(path),
            got=_free(path.parent),
            expected=needs,
            do="free space and run the same command again: what was committed is kept",
        )
    return StoreError(
        "the disk refused a write",
        where=str(path),
        got=f"{error.strerror} ({errno.errorcode.get(error.errno, error.errno)})" if error.errno else str(error),
        expected=f"{needs}, written and flushed",
        do="check the disk, then run the same command again: what was committed is kept",
    )


def read_error(error: OSError, path: Path) -> StoreError:
    """Turn an operating-system error of a read into ours.

    Args:
        error: what the system reported.
        path: the file that was being read.

    Returns:
        A StoreError that names the file.
    """
    return StoreError(
        "a file cannot be read",
        where=str(path),
        got=f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})",
        expected="a readable file",
        do="check that it exists, its permissions and the disk",
    )


def _free(folder: Path) -> str:
    try:
        state = os.statvfs(folder)
    except OSError:
        return "unknown free space"
    return f"{state.f_bavail * state.f_frsize} bytes free"


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable.

    Args:
        folder: an existing folder.

    Raises:
        StoreError: the disk reports an error.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise write_error(error, folder, 0) from error


def make_folder(folder: Path) -> None:
    """Make a folder (mode 0700) and its missing parents, each durable in its parent.

    Args:
        folder: the folder; nothing happens when it exists.

    Raises:
        StoreError: the disk reports an error, or a file has the name.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise write_error(error, folder, 0) from error
    fsync_folder(folder.parent)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file (mode 0600) under a temporary name, fsync it and rename it; the folder is left to the caller.

    Args:
        path: final name; replaced when it exists.
        data: all of its bytes.

    Raises:
        DiskFullError: no space is left.
        StoreError: any other error of the disk. In both cases ``path`` is as it was.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}{TMP_SUFFIX}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)  # noqa: PTH105 - one system call, which the crash trials count
    except OSError as error:
        failure = write_error(error, path, len(data))
        temporary.unlink(missing_ok=True)  # on a full disk the half-written file would keep it full
        raise failure from error


def write_bytes_atomic(path: Path, data: bytes | memoryview) -> None:
    """Publish a file: whoever sees the name sees all bytes, also after a power loss.

    Args:
        path: final name; replaced when it exists.
        data: all of its bytes.

    Raises:
        StoreError: an error of the disk (DiskFullError when it is full).
    """
    write_file(path, data)
    fsync_folder(path.parent)


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Publish a file (mode 0600) that is written a part at a time: whoever sees the name sees all bytes.

    Args:
        path: final name; replaced when it exists.
        write: fills the file of the temporary name it is given, which exists and is empty.

    Raises:
        DiskFullError: no space is left.
        StoreError: any other error of the disk. In both cases ``path`` is as it was.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}{TMP_SUFFIX}")
    size = 0
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write(temporary)
            os.fsync(handle)
        finally:
            size = os.fstat(handle).st_size
            os.close(handle)
        os.replace(temporary, path)  # noqa: PTH105 - as above
    except OSError as error:
        raise write_error(error, path, size + 1) from error  # at least one more than it got
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Publish a value as indented JSON with sorted keys.

    Args:
        path: final name; replaced when it exists.
        value: as for :func:`canonical_json`; equal values give equal bytes.

    Raises:
        StoreError: an error of the disk (DiskFullError when it is full).
        TypeError: a value has no JSON form.
        ValueError: a float is not finite.
    """
    write_bytes_atomic(path, pretty_json(value))


def pretty_json(value: Any) -> bytes:
    """Write a value as JSON for people: sorted keys, indented, ASCII, one newline at the end.

    Args:
        value: as for :func:`canonical_json`.

    Returns:
        The bytes of a file.
    """
    _check_keys(value)
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that a killed writer left.

    Args:
        folder: whose files are looked at; may be absent. Nobody else may be writing in it.
    """
    for path in folder.glob(f"*{TMP_SUFFIX}"):
        if re.fullmatch(rf".+\.[0-9a-f]{{12}}{re.escape(TMP_SUFFIX)}", path.name):
            path.unlink(missing_ok=True)


def read_finished(run: Path) -> dict[str, Any]:
    """Read the manifest of a finished ``gradsift select`` and check that recipe and rows are those that it was written for.

    Args:
        run: the run folder.

    Returns:
        Content of ``manifest.json``. One of before it named files is taken as it is.

    Raises:
        DataError: there is no manifest, or a file is another one than it names.
        StoreError: a file cannot be read.
    """
    path = run / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        files = manifest.get("files", {}).items()
    except FileNotFoundError:
        raise _unfinished(path, "no such file") from None
    except OSError as error:
        raise read_error(error, path) from None
    except (ValueError, AttributeError):
        raise _unfinished(path, "no manifest in JSON") from None
    for name, digest in files:
        file = run / name
        if not file.is_file() or sha256_file(file) != digest:
            raise _unfinished(file, "another file than manifest.json names" if file.is_file() else "no such file")
    return manifest


def _unfinished(file: Path, got: str) -> DataError:
    return DataError(
        "this run is not finished, or its files were changed", where=str(file), got=got,
        expected=f"{RECIPE}, the selected rows and {MANIFEST} of one run of gradsift select",
        do="run the same gradsift select again; rows that you edited are trained on with --selection FILE",
    )  # fmt: skip


def seal(value: dict[str, Any]) -> bytes:
    """Write a mapping as JSON that carries the hash of its own content.

    Args:
        value: as for :func:`canonical_json`, without a key ``seal``.

    Returns:
        The bytes of a file that :func:`unseal` accepts; any other bytes it refuses.

    Raises:
        ValueError: the mapping has a key ``seal``.
    """
    if "seal" in value:
        raise ValueError("a sealed mapping cannot hold the key 'seal'")
    return pretty_json({**value, "seal": sha256_bytes(canonical_json(value).encode("ascii"))})


def unseal(data: bytes) -> dict[str, Any] | None:
    """Read what :func:`seal` wrote.

    Args:
        data: all bytes of the file.

    Returns:
        The mapping without its seal, or None when a single bit differs from what was written.
    """
    try:
        value = json.loads(data)
        mark = value.pop("seal")
        # Comparing the whole text also catches flips that JSON would forgive, such as a changed blank.
        return value if seal(value) == data and isinstance(mark, str) else None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
