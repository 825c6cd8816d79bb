"""Committing shards: when ``commit`` has returned, the rows survive a kill, a full disk and a power loss (ours).

Order of one commit: each of the shard's files is written under a temporary name, fsynced and renamed; the folder is
fsynced; then the commit record goes the same way. A kill at any point leaves either the whole shard or leftovers that
no record names, which the next writer removes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Int

from gradsift.errors import SpecError, StoreError
from gradsift.manifest import TMP_SUFFIX, fsync_folder, make_folder, write_bytes_atomic, write_error, write_file
from gradsift.store.index import RowIndex
from gradsift.store.ledger import (
    LEDGER,
    QUARANTINE,
    RECORD_SUFFIX,
    SHARDS,
    Ledger,
    Record,
    damage,
    encode_record,
    read_ledger,
    read_record,
)
from gradsift.store.lock import Lock, take_lock
from gradsift.store.reading import decode_rows, read_ids
from gradsift.store.shards import ShardResult, encode_shard, make_record, unit_name
from gradsift.store.spec import SPEC_FILE, GradientSpec, compare, encode_spec, read_spec


@dataclass(frozen=True)
class Cleaned:
    """What a writer found lying about when it opened the store.

    Args:
        temporary: files that a kill left half-written, removed.
        unrecorded: shard files without a commit record, removed; their rows are measured again.
        damaged_records: records with a broken seal, moved to ``quarantine``; their rows are measured again.
    """

    temporary: int = 0
    unrecorded: int = 0
    damaged_records: int = 0


@dataclass(frozen=True)
class Committed:
    """What one commit did.

    Args:
        unit: the shard, or empty when every row was already committed.
        num_rows: rows that are new.
        num_repeated: rows that were already committed with the same content; the first result stays.
    """

    unit: str
    num_rows: int
    num_repeated: int


class SignalWriter:
    """The one writer of a store; use it in ``with``, or call ``close``. Made by :func:`open_writer`.

    Args:
        folder: the store's folder.
        spec: what is measured.
        lock: the held lock.
        made_by: recorded with every shard, never compared.
        cleaned: what was found at opening.
    """

    def __init__(
        self, folder: Path, spec: GradientSpec, lock: Lock, made_by: Mapping[str, str], cleaned: Cleaned
    ) -> None:
        self.folder, self.spec, self.cleaned = folder, spec, cleaned
        self._lock, self._made_by, self._failed = lock, dict(made_by), False
        # Per row 8 bytes, per shard its name: whatever else is asked is read from the shard, checked.
        self._units: dict[str, int] = {}
        self._rows = RowIndex(lambda shard: self._read_contents(list(self._units)[shard]))
        self._status: Counter[str] = Counter()

    def committed_ids(self) -> Mapping[str, str]:
        """Tell what need not be measured again; for many rows :meth:`contents` is far faster.

        Returns:
            Row id -> content hash, read-only, growing with every commit; read from the row tables when asked.
        """
        return self._rows

    def contents(self, ids: Sequence[str]) -> list[str | None]:
        """Look up committed rows, reading each shard that holds some of them once.

        Args:
            ids: n row ids.

        Returns:
            Per row the content hash that is committed, or None where it is not committed.

        Raises:
            StoreError: a row table is damaged.
        """
        return self._rows.find(ids)

    def missing(self, ids: Sequence[str], content_hashes: Sequence[str]) -> Int[np.ndarray, " k"]:
        """Tell which rows must still be measured.

        Args:
            ids: n row ids.
            content_hashes: their content hashes.

        Returns:
            int64 [k] positions of the rows that are not committed, increasing.

        Raises:
            SpecError: a row is committed with other content.
        """
        # A shard is named after its rows and their contents: one that is committed whole needs no look into it.
        if unit_name(tuple(ids), tuple(content_hashes)) in self._units:
            return np.zeros(0, dtype=np.int64)
        rows = []
        found = self._rows.find(ids)
        for row, (name, content, old) in enumerate(zip(ids, content_hashes, found, strict=True)):
            if old is None:
                rows.append(row)
            elif old != content:
                refuse_changed(name, old, content, self.folder)
        return np.array(rows, dtype=np.int64)

    def status_counts(self) -> Mapping[str, int]:
        """Count the committed rows.

        Returns:
            Status -> number of rows.
        """
        return MappingProxyType(dict(self._status))

    def beat(self) -> None:
        """Renew the heartbeat; call it now and then while a long shard is being measured."""
        self._lock.beat()

    def commit(self, result: ShardResult) -> Committed:
        """Make a shard's rows durable, all or none.

        Args:
            result: what was measured. Rows already committed with the same content are left as they are.

        Returns:
            The shard's name and how many rows were new.

        Raises:
            SpecError: a row is already committed with other content.
            DiskFullError: no space is left; what was committed is kept.
            StoreError: the disk reports an error, the writer is closed, or an earlier commit failed.
            NumericsError: a usable row holds a number that is not finite; nothing is written.
        """
        self._refuse_closed()
        new = self.missing(result.ids, result.content_hashes)
        if not new.size:
            return Committed("", 0, len(result.ids))
        part = result if len(new) == len(result.ids) else result.take(new)
        files = encode_shard(part, self.spec)
        record = make_record(part, self.spec, files, self._made_by)
        self._failed = True  # until proven otherwise, also when a signal interrupts the lines below
        for name, data in files.items():
            write_file(self.folder / SHARDS / name, data)
        fsync_folder(self.folder / SHARDS)
        write_bytes_atomic(self.folder / LEDGER / f"{record.unit}{RECORD_SUFFIX}", encode_record(record))
        self._failed = False
        self._remember(part.ids, record)
        self._lock.beat()
        return Committed(record.unit, len(part.ids), len(result.ids) - len(part.ids))

    def adopt(self, record: Record, ids: tuple[str, ...], put: Callable[[], None]) -> None:
        """Commit a shard that another process measured and the caller has verified (:mod:`gradsift.store.staging`).

        Args:
            record: its record, as staged.
            ids: its row ids; none of them committed.
            put: gives the shard's files their place under ``shards``; they are durable already.

        Raises:
            StoreError: the disk reports an error, the writer is closed, or an earlier commit failed.
        """
        self._refuse_closed()
        self._refuse_twice(ids, record.unit)
        self._failed = True  # as in commit
        put()
        fsync_folder(self.folder / SHARDS)
        write_bytes_atomic(self.folder / LEDGER / f"{record.unit}{RECORD_SUFFIX}", encode_record(record))
        self._failed = False
        self._remember(ids, record)
        self._lock.beat()

    def close(self) -> None:
        """Give the store free for the next writer. Does nothing when already closed."""
        self._lock.release()

    def __enter__(self) -> SignalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_closed(self) -> None:
        if not self._lock.held:
            raise StoreError("this writer is closed", where=str(self.folder), do="open the store again")
        if self._failed:
            raise StoreError(
                "an earlier commit of this writer did not finish",
                where=str(self.folder),
                expected="no commit after a failed one, since the disk's state is unknown",
                do="run the same command again: what was committed is kept",
            )

    def _refuse_twice(self, ids: tuple[str, ...], unit: str) -> None:
        for name, old in zip(ids, self._rows.find(ids)):
            if old is not None:
                raise _twice(name, unit, self.folder)

    def _remember(self, ids: tuple[str, ...], record: Record) -> None:
        self._units[record.unit] = len(self._units)
        self._rows.add(ids)
        self._status.update(record.status)

    def _take_in(self, records: Sequence[Record]) -> None:
        """Learn what is committed; every shard's files must be there and its row table must be whole."""
        self._units = {record.unit: number for number, record in enumerate(records)}
        for record in records:
            _check_sizes(self.folder, record)
            self._status.update(record.status)
        twice = self._rows.fill(read_ids(self.folder, record) for record in records)
        if twice is not None:
            raise _twice(twice[0], records[twice[2]].unit, self.folder)

    def _read_contents(self, unit: str) -> Mapping[str, str]:
        rows = decode_rows(self.folder, read_record(self.folder, unit), self.spec)
        return dict(zip(rows.ids, rows.content_hashes))


def _twice(row: str, unit: str, folder: Path) -> StoreError:
    return StoreError(
        "a row is committed twice",
        where=f"row {row}, again in shard {unit}",
        expected="one shard per row",
        do=f"delete {folder} and run the same command again",
    )


def refuse_changed(row: str, old: str, new: str, folder: Path) -> None:
    """Refuse a row whose tokens or mask are not those that were measured.

    Args:
        row: its id.
        old: content hash in the store.
        new: content hash now.
        folder: the store's folder.

    Raises:
        SpecError: always.
    """
    raise SpecError(
        "a row is not what it was when it was measured",
        where=f"row {row} in {folder}",
        got=f"content {new}",
        expected=f"content {old}",
        do="use another --out, restore the row, or give the changed row another id",
    )


def open_writer(folder: Path, spec: GradientSpec, *, made_by: Mapping[str, str] | None = None) -> SignalWriter:
    """Open a store for writing, making it when it does not exist; leftovers of a killed writer are removed.

    Args:
        folder: the store's own folder, from :func:`gradsift.store.spec.store_folder`.
        spec: what is measured; must equal what the store holds.
        made_by: device, versions, batch size: recorded with every shard, never compared.

    Returns:
        The writer, which holds the store's lock.

    Raises:
        SpecError: the store holds signals of another spec; the fields are named.
        StoreError: another writer holds the store, or the store is damaged or from a newer version.
        DiskFullError: no space is left.
    """
    make_folder(folder)
    fsync_folder(folder.parent)  # an earlier opening may have been killed between making the folder and this
    lock = take_lock(folder)
    try:
        old = read_spec(folder)
        if old is not None:
            compare(old, spec, where=str(folder))
        for part in (SHARDS, LEDGER):
            make_folder(folder / part)
        if old is None:
            _refuse_orphans(folder, spec)
            write_bytes_atomic(folder / SPEC_FILE, encode_spec(spec))
        ledger = read_ledger(folder, spec.key)
        writer = SignalWriter(folder, spec, lock, made_by or {}, _clean(folder, ledger))
        writer._take_in(ledger.records)
    except BaseException:
        lock.release()
        raise
    return writer


def _refuse_orphans(folder: Path, spec: GradientSpec) -> None:
    """Refuse shards without a description, unless their records say that they belong to this spec."""
    ledger = read_ledger(folder, spec.key)
    if ledger.damaged:
        raise SpecError(
            "the store's description is missing and its shards do not belong to this run",
            where=str(folder),
            got=f"records {', '.join(ledger.damaged[:3])}",
            expected=f"records of spec {spec.key}",
            do=f"use another --out, or delete {folder}",
        )


def _check_sizes(folder: Path, record: Record) -> None:
    for name, mark in record.files.items():
        try:
            found = (folder / SHARDS / name).stat().st_size
        except FileNotFoundError:
            raise damage(folder, record, name, "no such file", f"{mark.bytes} bytes") from None
        if found != mark.bytes:
            raise damage(folder, record, name, f"{found} bytes", f"{mark.bytes} bytes")


def _clean(folder: Path, ledger: Ledger) -> Cleaned:
    temporary = unrecorded = 0
    try:
        if ledger.damaged:
            make_folder(folder / QUARANTINE)
        for name in ledger.damaged:
            os.replace(folder / LEDGER / name, free_name(folder / QUARANTINE / name))  # noqa: PTH105
        known = {name for record in ledger.records for name in record.files}
        for part in (folder, folder / SHARDS, folder / LEDGER):
            for path in sorted(part.iterdir()):
                # beside shards/ and ledger/ lie other stages' files, which this lock does not guard
                if path.name.endswith(TMP_SUFFIX) and (part != folder or path.name.startswith(SPEC_FILE)):
                    path.unlink()
                    temporary += 1
                elif part.name == SHARDS and path.name not in known and path.is_file():
                    path.unlink()
                    unrecorded += 1
    except OSError as error:
        raise write_error(error, Path(error.filename or folder), 0) from error
    return Cleaned(temporary, unrecorded, len(ledger.damaged))


def free_name(path: Path) -> Path:
    """Find a name that is not taken.

    Args:
        path: the wanted name.

    Returns:
        ``path``, or ``path.1``, ``path.2`` and so on.
    """
    count, found = 0, path
    while found.exists():
        count += 1
        found = path.with_name(f"{path.name}.{count}")
    return found
