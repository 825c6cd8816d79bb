"""R24: stores of every format open, one from the future is refused in plain words, a read-only folder is read."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmarks.reliability.frame import ROOT, Check, Outcome, Trial
from tests.unit.store.store_world import EMBEDDING_SPEC, SPEC, make_ids, make_spec, memory_folder, read, truth

from gradsift.errors import GradsiftError
from gradsift.manifest import seal, unseal
from gradsift.store import ledger, spec
from gradsift.store.signals import open_store
from gradsift.store.spec import FORMAT
from gradsift.store.verify import verify_store
from gradsift.store.writer import open_writer

KEPT = ROOT / "tests" / "unit" / "store"
IDS = make_ids(6)
BLIND = "the format number is not looked at"
SPECS = {1: SPEC, 2: EMBEDDING_SPEC}
EXTRAS = ("alone_loss", "hidden_0", "hidden_12", "prompt_loss")


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant a defect."""
    if not defect:
        yield
        return
    with patch.object(spec, "refuse_future", lambda *_: None), patch.object(ledger, "refuse_future", lambda *_: None):
        yield


def opens(folder: Path, number: int) -> bool:
    """Whether a store of an old format says bit for bit what it was written to say."""
    if not verify_store(folder).ok:
        return False
    if number in SPECS:
        return read(folder, SPECS[number]) == truth(IDS, embedding=number == 2)
    # format 3 has signals in files of their own, beside those of format 1
    store = open_store(folder, make_spec(signals=(*SPEC.signals, *EXTRAS)))
    usable = [name for name, status in zip(store.ids, store.status) if status.usable]
    numbers = [int(name.rpartition("-")[2]) for name in usable]
    same = np.array_equal(store.extra("prompt_loss", usable), np.sqrt(numbers))
    return same and all(store.extra(name, usable).shape[0] == len(usable) for name in EXTRAS)


def future(folder: Path, which: str) -> None:
    """Turn a store into one of a version to come."""
    path = folder / "spec.json" if which == "description" else sorted((folder / "ledger").iterdir())[0]
    value = unseal(path.read_bytes())
    assert value is not None
    path.write_bytes(seal({**value, "format": FORMAT + 4, "new_field": [1]}))


def refused(folder: Path) -> bool:
    """Whether readers, writers and ``verify`` all refuse and say which format was met and which is known."""
    said = []
    for look in (lambda: open_store(folder), lambda: open_writer(folder, SPEC), lambda: verify_store(folder)):
        try:
            look()
        except GradsiftError as error:
            said.append(str(error))
        except Exception as error:
            said.append(type(error).__name__)
        else:
            said.append("")
    words = (f"format {FORMAT + 4}", f"format {FORMAT} or older", "newer gradsift", "upgrade")
    return all(word in text for text in said for word in words)


LOOK = """
import json, os, sys
from pathlib import Path
from tests.unit.store.store_world import SPEC, make_ids, read, truth
from gradsift.errors import StoreError
from gradsift.store.verify import verify_store
from gradsift.store.writer import open_writer
folder, kept = Path(sys.argv[1]), Path(sys.argv[2])
verify_store(kept), read(kept)  # all modules are loaded now, which nobody may be unable to do
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)  # root may write anywhere
found = {"read": read(folder) == truth(make_ids(6)), "verified": verify_store(folder).ok, "writer refused": False}
try:
    open_writer(folder, SPEC)
except StoreError as error:
    found["writer refused"] = "denied" in str(error) or "Read-only" in str(error)
print(json.dumps(found))
"""


def read_only(room: Path) -> dict[str, bool]:
    """Look at a store in a folder without write permission, as somebody who is not root."""
    folder = room / "read-only"
    shutil.copytree(KEPT / "format_1", folder)
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    room.chmod(0o755)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", LOOK, str(folder), str(KEPT / "format_1")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    found = json.loads(done.stdout) if done.returncode == 0 else {"read": False, "said": done.stderr[-300:]}
    after = sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(stat.S_IRWXU)
    return found | {"untouched": before == after}


def run(full: bool, defect: str) -> dict[str, Any]:
    """The same at both sizes."""
    numbers = sorted(int(path.name.partition("_")[2]) for path in KEPT.glob("format_*"))
    figures: dict[str, Any] = {"formats": numbers, "newest": FORMAT, "opened": [], "future": {}, "read_only": {}}
    with memory_folder() as room, planted(defect):
        figures["opened"] = [n for n in numbers if opens(KEPT / f"format_{n}", n)]
        for which in ("description", "record"):
            shutil.copytree(KEPT / "format_1", room / which)
            future(room / which, which)
            figures["future"][which] = refused(room / which)
        figures["read_only"] = read_only(room)
    return figures


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Every format that was ever written opens; the future is refused; a read-only folder is read."""
    f = figures
    every = f["formats"] == list(range(1, f["newest"] + 1)) == f["opened"]
    kept = f["read_only"]
    said = ", ".join(f"{name} {'yes' if value is True else value}" for name, value in kept.items())
    return Outcome(
        "R24",
        (
            Check("formats that open", f"{f['opened']} of 1..{f['newest']}", "all", every),
            Check("the future refused with its number", f"{sum(f['future'].values())}/2", "2/2", all(f["future"].values())),
            Check("read-only folder", said, "read, verified, writers refused, untouched", len(kept) == 4 and all(kept.values())),
        ),
    )  # fmt: skip


TRIAL = Trial(
    "R24", "stores of every format, of the future, in a read-only folder", "old opens, future refused, read-only reads",
    run, judge, (BLIND,), shares_process=True,
)  # fmt: skip
