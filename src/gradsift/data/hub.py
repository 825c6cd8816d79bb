"""Data sets of the Hugging Face hub, through ``datasets``; asked only when a hub id is given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gradsift.data.lines import Opened
from gradsift.data.tables import TableRows, digest_files
from gradsift.errors import DataError

_NAME = r"[A-Za-z0-9][\w.\-]*"
HUB_ID = re.compile(rf"(?P<name>{_NAME}(?:/{_NAME})?)(?:@(?P<revision>[\w.\-/]+))?(?::(?P<split>[\w.\[\]:%+\-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def read_hub(source: str) -> Opened | None:
    """Load ``org/name``, ``name``, ``name:split``, ``name@revision`` or ``name@revision:split``.

    The split is ``train`` unless given and may be a slice (``train[:10%]``). Offline, a data set that was loaded once
    online is found in the cache of ``datasets``; there a revision can only be checked when it is a full commit.

    Args:
        source: the hub id as given.

    Returns:
        Its rows as a memory-mapped table with the commit it came from, or None when the text is no hub id.

    Raises:
        DataError: the hub or its cache does not give the data set, or gives another revision.
    """
    match = HUB_ID.fullmatch(source)
    if match is None:
        return None
    name, revision, split = match["name"], match["revision"], match["split"] or "train"
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, revision=revision)
        _check_revision(source, builder, revision)
        builder.download_and_prepare()
        dataset: Any = builder.as_dataset(split=split)
        table = dataset.with_format("arrow")[:]
        digest = digest_files([Path(part["filename"]) for part in dataset.cache_files])
    except DataError:
        raise
    except Exception as error:  # whatever the hub, its cache or a data set's own files raise: it is named, not hidden
        cause = str(error).strip().split("\n")[0][:300]
        raise DataError(
            "no such file, and the hub gives no such data set",
            where=source,
            got=f"{type(error).__name__}: {cause}",
            expected="a file, or a hub id: org/name, org/name:split, org/name@commit",
            do="check the path; or download the data and pass the local file; offline (HF_HUB_OFFLINE=1) only a data "
            "set that datasets.load_dataset has loaded before is found, in HF_DATASETS_CACHE",
        ) from None
    return Opened("hub", digest, TableRows(table), revision=builder.hash or "")


def _check_revision(source: str, builder: Any, revision: str | None) -> None:
    """Refuse another commit than was asked: offline, datasets takes the latest cached one without a word."""
    from datasets.packaged_modules.cache.cache import Cache

    if revision is None or not (isinstance(builder, Cache) or COMMIT.fullmatch(revision)):
        return
    if builder.hash != revision:
        raise DataError(
            "the cache holds another revision of the data set",
            where=source,
            got=builder.hash,
            expected=revision,
            do="name the cached commit in full, leave the revision out, or load this revision once while online",
        )
