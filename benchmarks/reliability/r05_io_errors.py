"""R5: EIO or ENOSPC at the n-th system call of any kind, for every n: a typed error, and nothing that failed is believed."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from tests.unit.store.store_world import SPEC, fill, make_ids, memory_folder, read, truth

from gradsift import manifest
from gradsift.errors import DiskFullError, GradsiftError
from gradsift.store.ledger import read_ledger
from gradsift.store.verify import verify_store

CALLS = ("open", "write", "fsync", "replace")
CODES = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
RETRIED = "a failed fsync is tried again and believed"
SILENT = "errors of writing are swallowed"


class Failing:
    """Let the n-th call of one system function fail; remember which files' fsync failed and which were fsynced later."""

    def __init__(self, call: str, at: int, code: int) -> None:
        self.real, self.at, self.code, self.count = getattr(os, call), at, code, 0
        self.failed, self.retried, self.is_sync = "", False, call == "fsync"

    def __call__(self, *args, **options):
        self.count += 1
        name = str(Path(f"/proc/self/fd/{args[0]}").readlink()) if self.is_sync else ""
        if self.count - 1 == self.at:
            self.failed = name
            raise OSError(self.code, os.strerror(self.code))
        self.retried |= bool(name) and name == self.failed
        return self.real(*args, **options)


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant a defect in how files are written."""
    if not defect:
        yield
        return
    plain, sync = manifest.write_bytes_atomic, os.fsync

    def again(path: Path, data: bytes) -> None:
        """Write a file; on an error write it once more, or say nothing."""
        handle = os.open(path.with_name(f"{path.name}.x.tmp"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(handle, data)
            try:
                os.fsync(handle)
            except OSError:
                if defect == RETRIED:
                    os.fsync(handle)
                else:
                    sync(handle)
            os.replace(path.with_name(f"{path.name}.x.tmp"), path)  # noqa: PTH105
        except OSError as error:
            if defect != SILENT:
                raise manifest.write_error(error, path, len(data)) from error
        finally:
            os.close(handle)

    from gradsift.store import writer

    with patch.object(writer, "write_file", again), patch.object(writer, "write_bytes_atomic", plain):
        yield


def failing_writes(room: Path, ids: tuple[str, ...], defect: str, figures: dict[str, Any]) -> None:
    """Let each call of a run fail once; the same command must then finish."""
    good = truth(ids)
    for call in CALLS:
        for text, code in CODES.items():
            at = 0
            while True:
                folder, acknowledged, error = room / "s", [], None
                failing = Failing(call, at, code)
                try:
                    with planted(defect), patch.object(os, call, failing):
                        fill(folder, ids, 5, committed=lambda result, a=acknowledged: a.extend(result.ids))
                except GradsiftError as found:
                    error = found
                except Exception as found:
                    figures["untyped"].append(f"{call} {at} {text}: {type(found).__name__}")
                if failing.count <= at:  # the run has fewer calls of that kind
                    shutil.rmtree(folder, ignore_errors=True)
                    break
                figures["injected"] += 1
                figures["typed"] += error is not None and isinstance(error, DiskFullError) == (code == errno.ENOSPC)
                figures["silent"] += error is None
                figures["retried_fsync"] += failing.retried
                figures["lost"] += bool(_lost(folder, acknowledged, good))
                figures["not_finished"] += not _finishes(folder, ids, good)
                shutil.rmtree(folder, ignore_errors=True)
                at += 1


def _lost(folder: Path, acknowledged: list[str], good: dict) -> bool:
    if not (folder / "spec.json").exists():
        return bool(acknowledged)
    try:
        found = read(folder)
        return not (set(acknowledged) <= set(found) and found.items() <= good.items() and verify_store(folder).ok)
    except GradsiftError:
        return True


def _finishes(folder: Path, ids: tuple[str, ...], good: dict) -> bool:
    try:
        fill(folder, ids, 5)
        return read(folder) == good and not list(folder.rglob("*.tmp"))
    except GradsiftError:
        return False


def failing_reads(room: Path, ids: tuple[str, ...], figures: dict[str, Any]) -> None:
    """Let each read of a store fail once; the error must name the file, and so the shard."""
    folder = room / "reads"
    fill(folder, ids, 3)
    num_records = len(read_ledger(folder, SPEC.key).records)
    assert num_records > 1
    real, at = io.open, 0
    while True:
        count, victim = 0, ""

        def opening(path, *more, at: int = at, **options):
            nonlocal count, victim
            if str(folder) in str(path):
                count += 1
                if count - 1 == at:
                    victim = str(path)
                    raise OSError(errno.EIO, os.strerror(errno.EIO), victim)
            return real(path, *more, **options)

        error: Exception | None = None
        with patch.object(io, "open", opening):
            try:
                read(folder)
            except Exception as found:
                error = found
        if count <= at:
            break
        figures["reads"] += 1
        figures["reads_named"] += isinstance(error, GradsiftError) and Path(victim).name in str(error)
        at += 1


def run(full: bool, defect: str) -> dict[str, Any]:
    """Inject everywhere."""
    ids = make_ids(25 if full else 5)
    figures: dict[str, Any] = {
        "injected": 0, "typed": 0, "silent": 0, "untyped": [], "retried_fsync": 0, "lost": 0, "not_finished": 0,
        "reads": 0, "reads_named": 0,
    }  # fmt: skip
    with memory_folder() as room:
        failing_writes(room, ids, defect, figures)
        failing_reads(room, ids, figures)
    figures["untyped"] = figures["untyped"][:5]
    return figures


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Every error typed, none silent, no fsync tried again, nothing lost, all finish."""
    f = figures
    bad = {name: f[name] for name in ("silent", "lost", "not_finished")} | {"untyped": len(f["untyped"])}
    said = ", ".join(f"{name} {count}" for name, count in bad.items())
    return Outcome(
        "R5",
        (
            Check("typed errors", f"{f['typed']}/{f['injected']} ({said})", "all, 0 silent",
                  f["typed"] == f["injected"] > 0 and not any(bad.values())),
            Check("failed fsyncs tried again", str(f["retried_fsync"]), "0", f["retried_fsync"] == 0),
            Check("failed reads that name the file", f"{f['reads_named']}/{f['reads']}", "all",
                  f["reads_named"] == f["reads"] > 0),
        ),
    )  # fmt: skip


TRIAL = Trial(
    "R5", "EIO and ENOSPC at the n-th open, write, fsync, rename, read", "100% typed, 0 silent", run, judge,
    (RETRIED, SILENT), {"rows": 25, "rows_per_shard": 5}, shares_process=True,
)  # fmt: skip
