"""Shards that another process measured: staged beside the store, verified, then taken into its commit log (ours).

A worker writes a finished shard into ``staging/`` exactly as a store is written: data files first, then a sealed record
under the shard's name. The one writer of the store checks every byte against that record before it commits the shard.
What a killed run left staged is found by the next one, whatever started it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gradsift.errors import StoreError
from gradsift.manifest import TMP_SUFFIX, fsync_folder, make_folder, write_bytes_atomic, write_error, write_file
from gradsift.store.ledger import LEDGER, QUARANTINE, RECORD_SUFFIX, SHARDS, Record, encode_record, read_ledger
from gradsift.store.reading import RowTable, decode_rows
from gradsift.store.shards import ShardResult, encode_shard, make_record
from gradsift.store.spec import GradientSpec
from gradsift.store.verify import check_shard
from gradsift.store.writer import SignalWriter, free_name

STAGING = "staging"
# A file system without hard links answers with one of these; the verified bytes are then written once more.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS)


@dataclass(frozen=True)
class Adopted:
    """What a look into the staging folder gave.

    Args:
        units: shards that are now committed, in the order they were.
        num_rows: their rows.
        repeated: shards whose rows were all committed before, by whoever was first; removed.
        refused: shard -> why it was not taken; moved to ``quarantine``, its rows are measured again.
    """

    units: tuple[str, ...] = ()
    num_rows: int = 0
    repeated: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def stage(folder: Path, spec: GradientSpec, result: ShardResult, made_by: Mapping[str, str]) -> str:
    """Leave a measured shard for the writer of the store; no lock is needed.

    Args:
        folder: the store's folder.
        spec: what the store holds.
        result: what was measured.
        made_by: recorded, never compared.

    Returns:
        The shard's name. When this returns, the shard survives a kill and a power loss.

    Raises:
        DiskFullError: no space is left.
        StoreError: the disk reports an error.
        NumericsError: a usable row holds a number that is not finite.
    """
    files = encode_shard(result, spec)
    record = make_record(result, spec, files, made_by)
    place = folder / STAGING
    for part in (folder, place, place / SHARDS, place / LEDGER):
        make_folder(part)
    for name, data in files.items():
        write_file(place / SHARDS / name, data)
    fsync_folder(place / SHARDS)
    write_bytes_atomic(place / LEDGER / f"{record.unit}{RECORD_SUFFIX}", encode_record(record))
    return record.unit


def is_staged(folder: Path, unit: str) -> bool:
    """Tell whether a shard lies staged, finished.

    Args:
        folder: the store's folder.
        unit: the shard.

    Returns:
        True where its record is there.
    """
    return (folder / STAGING / LEDGER / f"{unit}{RECORD_SUFFIX}").exists()


def adopt_staged(
    writer: SignalWriter, contents: Mapping[str, str], order: Mapping[str, int] | None = None, *, opening: bool = False
) -> Adopted:
    """Commit what lies staged, each shard only after all of its bytes match its record.

    Args:
        writer: the open writer of the store.
        contents: row id -> content hash of every row that is to be measured now.
        order: shard -> place in the plan; shards are committed in that order, others after them by name.
        opening: also remove what a kill left half-staged; only before workers of this run begin.

    Returns:
        What was taken and what was not.

    Raises:
        StoreError: the disk reports an error (DiskFullError when it is full).
    """
    place, spec = writer.folder / STAGING, writer.spec
    if not (place / LEDGER).is_dir():
        return Adopted()
    ledger = read_ledger(place, spec.key)
    refused = {Path(name).stem: "its record's seal is broken or it belongs to another store" for name in ledger.damaged}
    places = order or {}
    units: list[str] = []
    repeated: list[str] = []
    num_rows = 0
    for record in sorted(ledger.records, key=lambda r: (places.get(r.unit, len(places)), r.unit)):
        why, rows = _judge(place, record, spec)
        why = why or _misfit(rows, contents, writer)
        if why == "repeated":
            repeated.append(record.unit)
        elif why or rows is None:
            refused[record.unit] = why
        else:
            writer.adopt(record, rows.ids, lambda r=record: _put(writer.folder, r))
            units.append(record.unit)
            num_rows += record.num_rows
        if record.unit not in refused:
            _remove(place, record)
    for unit in refused:
        _set_aside(writer.folder, unit)
    if opening:
        _sweep(place)
    return Adopted(tuple(units), num_rows, tuple(repeated), refused)


def _judge(place: Path, record: Record, spec: GradientSpec) -> tuple[str, RowTable | None]:
    """Check a staged shard to its last byte; say what is wrong with it, or give its rows."""
    damage = check_shard(place, record, spec)
    if damage:
        return f"{damage[0].path}: {damage[0].detail}", None
    try:
        return "", decode_rows(place, record, spec)
    except StoreError as error:  # changed between the two looks
        return error.what, None


def _misfit(rows: RowTable | None, contents: Mapping[str, str], writer: SignalWriter) -> str:
    """Say why sound rows are not wanted; empty when they are."""
    if rows is None:
        return "no rows"
    pairs = list(zip(rows.ids, rows.content_hashes, strict=True))
    num_done = sum(old == content for old, (_, content) in zip(writer.contents(rows.ids), pairs, strict=True))
    if num_done == len(pairs):
        return "repeated"
    if num_done:
        return f"{num_done} of its {len(pairs)} rows are committed in another shard"
    strange = [name for name, content in pairs if contents.get(name) != content]
    return f"row {strange[0]} is not in the pool or has other content" if strange else ""


def _put(folder: Path, record: Record) -> None:
    """Give the staged files their place in the store; they stay staged until the record is committed."""
    for name in record.files:
        source, target = folder / STAGING / SHARDS / name, folder / SHARDS / name
        try:
            target.unlink(missing_ok=True)
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise write_error(error, target, record.files[name].bytes) from error
            write_file(target, source.read_bytes())


def _remove(place: Path, record: Record) -> None:
    """Forget a staged shard, record first: a kill between leaves files that no record names."""
    for path in (place / LEDGER / f"{record.unit}{RECORD_SUFFIX}", *(place / SHARDS / name for name in record.files)):
        with contextlib.suppress(OSError):  # what cannot be removed is found as repeated the next time
            path.unlink(missing_ok=True)


def _set_aside(folder: Path, unit: str) -> None:
    """Move a refused shard to ``quarantine``, record first."""
    make_folder(folder / QUARANTINE)
    place = folder / STAGING
    for path in (place / LEDGER / f"{unit}{RECORD_SUFFIX}", *sorted((place / SHARDS).glob(f"{unit}-*"))):
        try:
            os.replace(path, free_name(folder / QUARANTINE / f"staged-{path.name}"))  # noqa: PTH105
        except FileNotFoundError:
            continue
        except OSError as error:
            raise write_error(error, path, 0) from error


def _sweep(place: Path) -> None:
    """Remove half-written files and files of shards that never got their record."""
    known = {path.stem for path in (place / LEDGER).glob(f"*{RECORD_SUFFIX}")}
    for part in (place / SHARDS, place / LEDGER):
        for path in sorted(part.iterdir()) if part.is_dir() else []:
            half = path.name.endswith(TMP_SUFFIX)
            if half or (part.name == SHARDS and path.name.partition("-")[0] not in known):
                with contextlib.suppress(FileNotFoundError):  # a straggler of a killed run may be renaming it now
                    path.unlink()
