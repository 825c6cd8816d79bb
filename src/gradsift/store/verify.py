"""Checking a store down to the last byte, and setting damaged shards aside (ours)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gradsift.errors import StoreError
from gradsift.manifest import TMP_SUFFIX, fsync_folder, make_folder, write_error
from gradsift.store.ledger import LEDGER, QUARANTINE, RECORD_SUFFIX, SHARDS, Ledger, Record, read_ledger
from gradsift.store.lock import take_lock
from gradsift.store.reading import decode_rows, map_embedding, map_extra, map_sketch, read_checked
from gradsift.store.shards import embedding_file, extra_file, rows_file, shard_files, sketch_file
from gradsift.store.spec import SPEC_FILE, GradientSpec, read_spec
from gradsift.store.writer import free_name

Kind = Literal["spec", "record", "file", "rows"]


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was committed.

    Args:
        kind: ``spec`` (description), ``record`` (broken seal, or of another store), ``file`` (missing, or other bytes
            than recorded), ``rows`` (contents that contradict the record or another shard).
        unit: the shard, empty for the description.
        path: the file, relative to the store.
        detail: what was found.
    """

    kind: Kind
    unit: str
    path: str
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """What a full check found.

    Args:
        num_shards: shards with a valid record.
        num_rows: their rows, by the records.
        num_bytes: bytes that were hashed.
        status: status -> rows, by the row tables of undamaged shards.
        damage: everything that is wrong.
        extras: files in ``shards`` and ``ledger`` that no record names (leftovers of a kill, or foreign); never read.
            Files that other stages keep beside them are their business.
    """

    num_shards: int
    num_rows: int
    num_bytes: int
    status: Mapping[str, int]
    damage: tuple[Damage, ...]
    extras: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was committed; extras do no harm."""
        return not self.damage


@dataclass(frozen=True)
class RepairReport:
    """What a repair set aside.

    Args:
        units: shards that were damaged; their rows are measured again by the next run.
        moved: files moved to ``quarantine``, relative to the store.
        num_rows: rows of those shards, as far as a record told.
    """

    units: tuple[str, ...]
    moved: tuple[str, ...]
    num_rows: int


def verify_store(folder: Path) -> VerifyReport:
    """Hash every file of a store and reconcile records, rows and statuses; writes nothing.

    Args:
        folder: the store's own folder.

    Returns:
        What was found; damage is reported, not raised.

    Raises:
        StoreError: there is no store, or a newer version wrote it.
    """
    try:
        spec = read_spec(folder)
    except StoreError as error:
        if "newer" in error.what:
            raise
        found = Damage("spec", "", SPEC_FILE, error.what)
        return VerifyReport(0, 0, 0, {}, (found,), ())
    if spec is None:
        if any((folder / LEDGER).glob(f"*{RECORD_SUFFIX}")):
            return VerifyReport(0, 0, 0, {}, (Damage("spec", "", SPEC_FILE, "no such file"),), ())
        raise StoreError("there is no signal store here", where=str(folder), got="no spec.json", do="check the path")
    ledger = read_ledger(folder, spec.key)
    damage = [Damage("record", Path(n).stem, f"{LEDGER}/{n}", "broken seal or foreign") for n in ledger.damaged]
    status: Counter[str] = Counter()
    owner: dict[str, str] = {}
    for record in ledger.records:
        damage += _check_shard(folder, record, spec, status, owner)
    return VerifyReport(
        num_shards=len(ledger.records),
        num_rows=sum(record.num_rows for record in ledger.records),
        num_bytes=sum(mark.bytes for record in ledger.records for mark in record.files.values()),
        status=dict(status),
        damage=tuple(damage),
        extras=_extras(folder, ledger),
    )


def _check_shard(
    folder: Path, record: Record, spec: GradientSpec, status: Counter[str], owner: dict[str, str]
) -> Iterator[Damage]:
    """Check one shard; adds its statuses and ids to ``status`` and ``owner`` when its rows are sound."""
    table = rows_file(record.unit)
    expected = set(shard_files(record.unit, spec))
    if set(record.files) != expected:
        detail = f"record names {sorted(record.files)}, expected {sorted(expected)}"
        yield Damage("rows", record.unit, f"{LEDGER}/{record.unit}{RECORD_SUFFIX}", detail)
        return
    for name in sorted(expected - {table}):
        try:
            read_checked(folder, record, name)
            if name == sketch_file(record.unit):
                map_sketch(folder, record, spec)
            elif name == embedding_file(record.unit):
                map_embedding(folder, record)
            else:
                map_extra(folder, record, name.removeprefix(f"{record.unit}-").removesuffix(".npy"))
        except StoreError as error:
            yield Damage("file", record.unit, f"{SHARDS}/{name}", f"{error.got}, expected {error.expected}")
    try:
        rows = decode_rows(folder, record, spec)
    except StoreError as error:
        yield Damage("file", record.unit, f"{SHARDS}/{table}", f"{error.got}, expected {error.expected}")
        return
    counts = Counter(str(s) for s in rows.status)
    if counts != Counter(record.status) or sum(record.status.values()) != record.num_rows:
        detail = f"statuses {dict(counts)}, the record says {dict(record.status)}"
        yield Damage("rows", record.unit, f"{SHARDS}/{table}", detail)
        return
    twice = [name for name in rows.ids if name in owner]
    if twice:
        yield Damage("rows", record.unit, f"{SHARDS}/{table}", f"row {twice[0]} is also in shard {owner[twice[0]]}")
        return
    owner.update(dict.fromkeys(rows.ids, record.unit))
    status.update(counts)


def check_shard(folder: Path, record: Record, spec: GradientSpec) -> tuple[Damage, ...]:
    """Hash every file of one shard and reconcile its rows and statuses with its record.

    Args:
        folder: the folder that holds ``shards``.
        record: the shard's record, whose seal is whole.
        spec: what the shard must hold.

    Returns:
        Everything that is wrong; empty when the shard is sound.
    """
    return tuple(_check_shard(folder, record, spec, Counter(), {}))


def _extras(folder: Path, ledger: Ledger) -> tuple[str, ...]:
    known = {f"{SHARDS}/{name}" for record in ledger.records for name in record.files}
    known |= {f"{LEDGER}/{record.unit}{RECORD_SUFFIX}" for record in ledger.records}
    known |= {f"{LEDGER}/{name}" for name in ledger.damaged}
    paths = [path for part in (SHARDS, LEDGER) for path in sorted((folder / part).rglob("*")) if not path.is_dir()]
    paths += sorted(folder.glob(f"{SPEC_FILE}.*{TMP_SUFFIX}"))
    return tuple(name for name in (path.relative_to(folder).as_posix() for path in paths) if name not in known)


def repair_store(folder: Path) -> RepairReport:
    """Move damaged shards to ``quarantine``, record first, so that the next run measures their rows again.

    Args:
        folder: the store's own folder.

    Returns:
        What was moved; nothing when the store is sound.

    Raises:
        StoreError: a writer holds the store, its description is damaged, or the disk reports an error.
    """
    with take_lock(folder):
        spec = read_spec(folder)
        report = verify_store(folder)
        if spec is None or not report.damage:
            return RepairReport((), (), 0)
        make_folder(folder / QUARANTINE)
        units = sorted({found.unit for found in report.damage})
        rows = {record.unit: record.num_rows for record in read_ledger(folder, spec.key).records}
        moved: list[str] = []
        for unit in units:
            moved += _move(folder, [f"{LEDGER}/{unit}{RECORD_SUFFIX}"])
            fsync_folder(folder / LEDGER)  # from here on the shard does not exist, whatever happens to its files
            names = (rows_file(unit), sketch_file(unit), embedding_file(unit))
            names += tuple(extra_file(unit, name) for name in spec.extras)
            moved += _move(folder, [f"{SHARDS}/{name}" for name in names])
        fsync_folder(folder / SHARDS)
        fsync_folder(folder / QUARANTINE)
        return RepairReport(tuple(units), tuple(moved), sum(rows.get(unit, 0) for unit in units))


def _move(folder: Path, names: list[str]) -> list[str]:
    moved = []
    for name in names:
        source = folder / name
        if source.exists() and not name.endswith(TMP_SUFFIX):
            try:
                os.replace(source, free_name(folder / QUARANTINE / source.name))  # noqa: PTH105
            except OSError as error:
                raise write_error(error, source, 0) from error
            moved.append(name)
    return moved
