"""R7: files of a store that are truncated, empty, missing, swapped or renamed: each is named for what it is, and mended."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from tests.unit.store.store_world import SPEC, fill, make_ids, make_spec, memory_folder, read, truth

from gradsift.errors import GradsiftError
from gradsift.store import verify
from gradsift.store.signals import open_store
from gradsift.store.verify import VerifyReport, repair_store, verify_store

IDS = make_ids(20)
KINDS = ("truncated", "empty", "missing", "swapped in the store", "swapped between runs", "renamed")
FILES = ("rows", "sketch", "record", "description")
PLACES = {"rows": "shards/{}-rows.parquet", "sketch": "shards/{}-sketch.npy", "record": "ledger/{}.json"}
SIZE_ONLY = "a file is believed when its size is right"


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant a defect."""
    if not defect:
        yield
        return
    plain = verify.read_checked

    def by_size(folder: Path, record: Any, name: str) -> bytes:
        data = (folder / "shards" / name).read_bytes() if (folder / "shards" / name).exists() else b""
        return data if len(data) == record.files[name].bytes else plain(folder, record, name)

    from gradsift.store import reading, signals

    with (
        patch.object(verify, "read_checked", by_size),
        patch.object(reading, "read_checked", by_size),
        patch.object(signals, "read_checked", by_size),
    ):
        yield


def spoil(folder: Path, other: Path, kind: str, which: str) -> Path:
    """Do it; gives the file that is wrong now."""
    a, b, *_ = (p.stem for p in sorted((folder / "ledger").iterdir()))
    path = folder / (PLACES[which].format(a) if which in PLACES else "spec.json")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    elif kind == "renamed":
        path.rename(path.with_name(f"something-else{path.suffix}"))
    else:
        if kind == "swapped in the store":
            donor = folder / (PLACES[which].format(b) if which in PLACES else f"ledger/{b}.json")
        else:  # a run with other rows and another model
            c = sorted((other / "ledger").iterdir())[0].stem
            donor = other / (PLACES[which].format(c) if which in PLACES else "spec.json")
        path.write_bytes(donor.read_bytes())
    return path


def classified(folder: Path, path: Path, kind: str, which: str) -> bool:
    """Whether ``verify`` says what is wrong, and nothing else is."""
    try:
        report: VerifyReport = verify_store(folder)
    except GradsiftError:
        return False
    found = {(d.kind, d.path) for d in report.damage}
    name = path.relative_to(folder).as_posix()
    if which == "record" and kind in ("missing", "renamed"):
        # a shard without a record was never committed: its files are extras; a record of another name is damaged
        expected = set() if kind == "missing" else {("record", "ledger/something-else.json")}
        return found == expected and len(report.extras) == 2
    if which == "description" and kind == "swapped between runs":
        return {k for k, _ in found} == {"record"} and len(found) == 3  # whole, but of other shards
    want = {"rows": "file", "sketch": "file", "record": "record", "description": "spec"}[which]
    return found == {(want, name)}


def refused(folder: Path) -> bool:
    """Whether reading all rows with the expected meaning is refused by an error of ours."""
    try:
        open_store(folder, SPEC).positions(IDS)
        read(folder)
    except GradsiftError:
        return True
    except Exception:
        return False
    return False


def mended(folder: Path, which: str) -> bool:
    """Whether repair, or the remedy that the message names, and a second run give the same store."""
    try:
        if which == "description":  # the remedy: delete it, the shards are kept if they fit
            (folder / "spec.json").unlink(missing_ok=True)
        else:
            repair_store(folder)
        fill(folder, IDS, 8)
        return read(folder) == truth(IDS) and verify_store(folder).ok
    except GradsiftError:
        return False


def run(full: bool, defect: str) -> dict[str, Any]:
    """All kinds over all files, and extra files."""
    figures: dict[str, Any] = {"cases": 0, "classified": 0, "refused": 0, "mended": 0, "bad": []}
    kinds = KINDS if full or defect else KINDS[::2]
    with memory_folder() as room, planted(defect):
        fill(room / "good", IDS, 8)
        fill(room / "other", make_ids(40)[20:], 8, spec=make_spec(model_sha256="x" * 64))
        for kind in kinds:
            for which in FILES:
                folder = room / "store"
                shutil.copytree(room / "good", folder)
                path = spoil(folder, room / "other", kind, which)
                marks = {
                    "classified": classified(folder, path, kind, which),
                    "refused": refused(folder),
                    "mended": mended(folder, which),
                }
                figures["cases"] += 1
                for name, good in marks.items():
                    figures[name] += good
                figures["bad"] += [f"{which} {kind}: not {name}" for name, good in marks.items() if not good]
                shutil.rmtree(folder)
        figures |= extras(room)
    return figures


def extras(room: Path) -> dict[str, Any]:
    """Files that nobody wrote: reported, never read, no damage."""
    folder = room / "good"
    strange = ["shards/holiday.jpg", "shards/deadbeef-rows.parquet", "ledger/notes.txt", "ledger/x.json.ab.tmp"]
    for name in strange:
        (folder / name).write_bytes(b"strange")
    report = verify_store(folder)
    equal = read(folder) == truth(IDS)
    return {
        "extras": len(strange),
        "extras_reported": len(set(strange) & set(report.extras)),
        "extras_ignored": equal and report.ok,
    }


def judge(figures: Mapping[str, Any]) -> Outcome:
    """All classified, refused, mended; extras ignored and reported."""
    f, cases = figures, figures["cases"]
    bad = f" ({'; '.join(f['bad'][:2])})" if f["bad"] else ""
    checks = [
        Check(name, f"{f[name]}/{cases}{bad if f[name] < cases else ''}", "all", f[name] == cases > 0)
        for name in ("classified", "refused", "mended")
    ]
    good = f["extras_reported"] == f["extras"] > 0 and f["extras_ignored"]
    checks.append(Check("extra files reported", f"{f['extras_reported']}/{f['extras']}", "all, and ignored", good))
    return Outcome("R7", tuple(checks))


TRIAL = Trial(
    "R7", "files truncated, empty, missing, swapped, renamed, extra", "24/24 cases classified", run, judge, (SIZE_ONLY,),
    {"kinds": list(KINDS), "files": list(FILES)}, shares_process=True,
)  # fmt: skip
