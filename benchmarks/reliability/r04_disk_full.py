"""R4: a disk that fills up, at twenty levels: told beforehand, a typed error otherwise, and nothing lost."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from tests.unit.store.store_world import fill, make_ids, make_spec, read, truth

from gradsift import manifest
from gradsift.errors import DiskFullError, GradsiftError
from gradsift.store import writer
from gradsift.store.room import bytes_needed, refuse_if_it_does_not_fit
from gradsift.store.signals import open_store
from gradsift.store.spec import Projection
from gradsift.store.verify import verify_store

DIM, PER_SHARD = 4093, 20
SPEC = make_spec(projection=Projection(DIM, 42, "signfold-1"))
SHORT = "a write that takes only a part of the bytes counts as whole"
UNTYPED = "a full disk is just an OSError"


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant a defect in how files are written."""
    plain = manifest.write_file

    def write_file(path: Path, data: bytes) -> None:
        try:
            plain(path, data)
        except DiskFullError:
            if defect == UNTYPED:
                raise OSError(28, "No space left on device") from None
            path.write_bytes(data[:0])  # what fits

    if not defect:
        yield
        return
    with patch.object(writer, "write_file", write_file):
        yield


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A real disk of some MiB; needs the right to mount one."""
    with tempfile.TemporaryDirectory(prefix="gradsift-disk-") as name:
        place = Path(name)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def barred() -> str:
    """Say why no small disk can be mounted here."""
    with tempfile.TemporaryDirectory(prefix="gradsift-disk-") as name:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", name], capture_output=True, text=True)
        if done.returncode:
            return f"mounting a small disk is barred here: {done.stderr.strip()}"
        subprocess.run(["umount", "-l", name], check=True)
    return ""


def one_level(free_kib: int, num_rows: int, good: dict, defect: str) -> dict[str, Any]:
    """Run into a full disk with so much left, then on a larger one to the end."""
    ids = make_ids(num_rows)
    marks: dict[str, Any] = {}
    with small_disk(8) as disk:
        (disk / "ballast").write_bytes(b"x" * (8192 - free_kib) * 1024)
        folder, acknowledged, again = disk / "store", list[str](), list[str]()
        marks["refused_beforehand"] = _refused(disk, ids)
        with planted(defect):
            marks["typed"] = _full(folder, ids, acknowledged)
        try:
            if (folder / "spec.json").exists():
                marks["verified"] = verify_store(folder).ok and set(acknowledged) <= set(open_store(folder, SPEC).ids)
            else:
                marks["verified"] = not acknowledged
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            marks["fits_later"] = not _refused(folder if folder.exists() else disk, ids)
            fill(folder, ids, PER_SHARD, spec=SPEC, measured=lambda result: again.extend(result.ids))
            marks["resumed"] = not set(again) & set(acknowledged) and read(folder, SPEC) == good
        except GradsiftError as error:
            marks |= {"verified": marks.get("verified", False), "resumed": False, "said": error.what}
        files = [p for part in ("shards", "ledger") for p in (folder / part).glob("*")]
        actual = sum(path.stat().st_blocks for path in files) * 512
        marks["estimate"] = bytes_needed(SPEC, ids, PER_SHARD) / max(1, actual) - 1
    return {"free_kib": free_kib, "acknowledged": len(acknowledged), **marks}


def _refused(folder: Path, ids: tuple[str, ...]) -> bool:
    try:
        refuse_if_it_does_not_fit(folder, SPEC, ids, PER_SHARD)
    except DiskFullError as error:
        return error.exit_code == 28 and "free" in str(error.got)
    return False


def _full(folder: Path, ids: tuple[str, ...], acknowledged: list[str]) -> bool:
    """Collect into a full disk; whether it ended with an error that names path, bytes and code."""
    try:
        fill(folder, ids, PER_SHARD, spec=SPEC, committed=lambda result: acknowledged.extend(result.ids))
    except DiskFullError as error:
        return error.exit_code == 28 and str(folder) in error.where and "bytes" in error.expected
    except (OSError, GradsiftError):
        return False
    return False


def run(full: bool, defect: str) -> dict[str, Any]:
    """Twenty levels from nothing to nearly enough."""
    num_rows = 400 if full else 60
    good = truth(make_ids(num_rows), dim=DIM)
    top = num_rows * DIM * 2 // 1024
    levels = [top * n // 21 for n in range(20)] if full else [0, top // 3, 4 * top // 5]
    return {"rows": num_rows, "levels": [one_level(level, num_rows, good, defect) for level in levels]}


def judge(figures: Mapping[str, Any]) -> Outcome:
    """All levels: refused beforehand, typed, verified, resumed; the estimate within 5%."""
    levels = figures["levels"]
    names = ("refused_beforehand", "typed", "verified", "fits_later", "resumed")
    good = sum(all(level.get(name, False) for name in names) for level in levels)
    each = ", ".join(f"{name} {sum(level.get(name, False) for level in levels)}" for name in names)
    worst = max((level["estimate"] for level in levels), key=abs)
    kept = sum(level["acknowledged"] > 0 for level in levels)
    return Outcome(
        "R4",
        (
            Check(
                "levels",
                f"{good}/{len(levels)} ({each}; {kept} had committed rows)",
                "20/20",
                good == len(levels) > 0 < kept,
            ),
            Check("size estimate off by", f"{worst:+.1%}", "5% at most", abs(worst) <= 0.05),
        ),
    )


TRIAL = Trial(
    "R4", "a real disk of 8 MiB filled at 20 levels, enlarged, resumed", "20/20; estimate within 5%", run, judge,
    (SHORT, UNTYPED), {"rows": 400, "rows_per_shard": PER_SHARD, "sketch_dim": DIM},
    barred=barred, shares_process=True,
)  # fmt: skip
