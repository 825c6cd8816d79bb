"""Files behind URLs, through ``fsspec``: copied once to the cache folder, then read as any local file (ours).

A copy is used again where the store names a version of the file (a date or an entity tag) and it is the same one; where it
names none, the file is fetched anew by every run and its copy is named by its bytes. So no copy ever changes under a reader.
Copies of more than 30 days ago are removed.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gradsift.data.cache import cache_folder, disk_errors, published_file, remove_old, sha256_file
from gradsift.errors import DataError
from gradsift.manifest import hash_parts

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://.+", re.DOTALL)
ARCHIVES = ("zip", "tar", "libarchive")
VERSIONS = ("etag", "mtime", "created", "modified", "last_modified", "last-modified", "lastmodified", "updated", "version",
            "generation", "content-md5", "md5hash", "crc32c", "oid", "sha256")  # fmt: skip


def local_copy(url: str) -> Path:
    """Give a local file with the bytes behind a URL.

    Args:
        url: such as ``s3://bucket/rows.parquet`` or ``memory://rows.jsonl``; its protocol must be one that ``fsspec`` knows.

    Returns:
        The file itself for ``file://``, otherwise a copy in the cache folder with the same ending.

    Raises:
        DataError: the URL leads into an archive, its protocol is not known or not installed, or there is no such file.
        DiskFullError: the cache folder has no space for the copy.
    """
    import fsspec
    from filelock import FileLock

    if "::" in url or url.partition("://")[0] in ARCHIVES:
        raise DataError(
            "compressed files and archives are never unpacked", where=url, do="unpack it and pass the file inside"
        )
    try:
        files, path = fsspec.core.url_to_fs(url)
        if "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol):
            return Path(path)
        facts = files.info(path)
        suffix = Path(urlsplit(path).path if "://" in path else path).suffix.lower()  # over http(s) it is the URL
    except Exception as error:  # every protocol raises its own kinds; all of them mean that nothing can be read
        raise _unreachable(url, error) from None
    if facts.get("type") == "directory":
        raise DataError("this is a folder, not a file", where=url, do="pass the files themselves, one --pool each")
    version = _version(facts)
    folder = cache_folder() / "remote"
    lock = folder / f"{_name(url)}.lock"
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        with FileLock(lock):  # of several processes of a run, one fetches
            os.utime(lock)  # see remove_old
            copy = folder / (_name(url, version) + suffix)
            if version and copy.is_file():
                return copy
            remove_old(folder)
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
                fetched = Path(scratch) / "file"
                _fetch(files, path, fetched, url, facts.get("size"))
                if not version:
                    copy = folder / (_name(url, sha256_file(fetched)) + suffix)
                if not copy.is_file():
                    with published_file(copy) as temporary:
                        fetched.replace(temporary)
    return copy


def _name(*parts: str) -> str:
    return hash_parts(part.encode("utf-8", "surrogatepass") for part in parts)


def _fetch(files: Any, path: str, temporary: Path, url: str, size: Any) -> None:
    try:
        files.get_file(path, str(temporary))
    except OSError as error:
        if error.errno is not None and error.filename == str(temporary):
            raise  # our own disk
        raise _unreachable(url, error) from None
    except Exception as error:  # as above
        raise _unreachable(url, error) from None
    found = temporary.stat().st_size
    if isinstance(size, int) and found != size:
        raise DataError(
            "the file did not arrive whole", where=url, got=f"{found} bytes", expected=f"{size} bytes",
            do="run the same command again",
        )  # fmt: skip


def _version(facts: Mapping[str, Any]) -> str:
    """What tells one version of a file from the next; empty where the store does not say."""
    marks = {name: str(facts[name]) for name in sorted(facts) if name.lower() in VERSIONS and facts[name]}
    return f"{facts.get('size')} {marks}" if marks else ""


def _unreachable(url: str, error: Exception) -> DataError:
    cause = str(error).strip().split("\n")[0][:300]
    return DataError(
        "the file cannot be fetched",
        where=url,
        got=f"{type(error).__name__}: {cause}",
        expected="a URL that fsspec can read",
        do="check the URL and your access to it; an unknown protocol needs its package (s3fs for s3://, gcsfs for gs://); or "
        "download the file and pass its path",
    )
