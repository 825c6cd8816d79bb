"""One commit record per shard: without a valid record a shard does not exist (ours).

A record is a sealed JSON file, published by rename after its shard's files are durable. A record cut at any byte, or
with any bit changed, breaks its seal and counts as damaged: never as half a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.errors import StoreError
from gradsift.manifest import TMP_SUFFIX, read_error, seal, unseal
from gradsift.store.spec import FORMAT, refuse_future

LEDGER = "ledger"
SHARDS = "shards"
QUARANTINE = "quarantine"
RECORD_SUFFIX = ".json"


@dataclass(frozen=True)
class FileMark:
    """What a shard's file must be.

    Args:
        bytes: its size.
        sha256: hash of its bytes.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """One commit.

    Args:
        unit: name of the shard, a hash of its row ids and their contents.
        spec_key: key of the spec it was measured with.
        num_rows: rows of the shard.
        ids_hash: hash of the row ids in order.
        content_hash: hash of the rows' content hashes in order.
        status: status -> number of rows, only those that occur.
        files: file name -> size and hash.
        made_by: recorded, never compared: device, batch size, versions.
        format: version of the layout.
    """

    unit: str
    spec_key: str
    num_rows: int
    ids_hash: str
    content_hash: str
    status: Mapping[str, int]
    files: Mapping[str, FileMark]
    made_by: Mapping[str, str]
    format: int = 1


@dataclass(frozen=True)
class Ledger:
    """All commit records of a store.

    Args:
        records: the valid ones, by unit name.
        damaged: file names in the ledger whose seal is broken or that belong to another store or unit.
    """

    records: tuple[Record, ...]
    damaged: tuple[str, ...]


def encode_record(record: Record) -> bytes:
    """Write a record's file.

    Args:
        record: the commit.

    Returns:
        Sealed JSON.
    """
    return seal(
        {
            "format": record.format,
            "unit": record.unit,
            "spec_key": record.spec_key,
            "num_rows": record.num_rows,
            "ids_hash": record.ids_hash,
            "content_hash": record.content_hash,
            "status": dict(record.status),
            "files": {name: {"bytes": mark.bytes, "sha256": mark.sha256} for name, mark in record.files.items()},
            "made_by": dict(record.made_by),
        }
    )


def decode_record(data: bytes) -> Record | None:
    """Read a record's file.

    Args:
        data: all of its bytes.

    Returns:
        The record, or None when it is torn or damaged.
    """
    value: dict[str, Any] | None = unseal(data)
    if value is None:
        return None
    try:
        files = {name: FileMark(**mark) for name, mark in value.pop("files").items()}
        return Record(**value, files=files)
    except (TypeError, KeyError, AttributeError):
        return None


def read_ledger(folder: Path, spec_key: str) -> Ledger:
    """Read every commit record of a store.

    Args:
        folder: the store's folder.
        spec_key: key of the store's spec; records of another store count as damaged.

    Returns:
        Valid records by unit name, and the names of the damaged ones.

    Raises:
        StoreError: the ledger cannot be read, or a record was written by a newer version.
    """
    ledger = folder / LEDGER
    records, damaged = [], []
    try:
        paths = sorted(ledger.glob("*")) if ledger.is_dir() else []
        for path in paths:
            if path.name.endswith(TMP_SUFFIX) or path.suffix != RECORD_SUFFIX:
                continue
            data = path.read_bytes()
            record = decode_record(data)
            if record is None or record.unit != path.stem or record.spec_key != spec_key:
                if unseal(data) is not None:
                    refuse_future(data, path)
                damaged.append(path.name)
                continue
            if record.format > FORMAT:
                refuse_future(data, path)
            records.append(record)
    except OSError as error:
        raise read_error(error, Path(error.filename or ledger)) from error
    return Ledger(tuple(records), tuple(damaged))


def read_record(folder: Path, unit: str) -> Record:
    """Read one commit record that is known to be there.

    Args:
        folder: the store's folder.
        unit: the shard.

    Returns:
        The record.

    Raises:
        StoreError: it cannot be read, or its seal is broken by now.
    """
    path = folder / LEDGER / f"{unit}{RECORD_SUFFIX}"
    try:
        record = decode_record(path.read_bytes())
    except OSError as error:
        raise read_error(error, path) from error
    if record is None or record.unit != unit:
        raise StoreError(
            "a commit record has changed since the store was opened",
            where=str(path),
            got="a broken seal",
            expected="the bytes that were committed",
            do="run gradsift verify, then the same command again",
        )
    return record


def damage(folder: Path, record: Record, name: str, got: str, expected: str) -> StoreError:
    """Describe a damaged shard file and what to do about it.

    Args:
        folder: the store's folder.
        record: the shard's record.
        name: the damaged file.
        got: what was found.
        expected: what the record says.

    Returns:
        The error to raise.
    """
    three = [*(f"{SHARDS}/{file}" for file in sorted(record.files)), f"{LEDGER}/{record.unit}{RECORD_SUFFIX}"]
    return StoreError(
        f"shard {record.unit} is damaged: {name}",
        where=str(folder / SHARDS / name),
        got=got,
        expected=expected,
        do=f"delete this shard's {len(three)} files ({', '.join(three)} in {folder}) and run the same command again: "
        f"only its {record.num_rows} rows are measured again",
    )
